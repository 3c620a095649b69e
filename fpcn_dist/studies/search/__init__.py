"""Search of hyperparameters with Ray Tune: space, trials, records of them, report."""
