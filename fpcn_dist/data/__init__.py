"""From a folder of photographs to batches on the training device."""
