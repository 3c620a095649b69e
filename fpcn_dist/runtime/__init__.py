"""What every room stands on: errors, files, locks, keys, ranks, and signals that end a run in good order."""
