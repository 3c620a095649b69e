"""Search of hyperparameters with Ray Tune: space, trials, driver, results."""
