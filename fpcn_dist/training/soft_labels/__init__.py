"""Where the batches of a distillation get the logits of their teacher from."""
