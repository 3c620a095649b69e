"""What a run leaves behind: its folder, checkpoints, metrics, evaluation, model and report."""
