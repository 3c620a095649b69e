"""Many trainings at once, on Ray: searches, distillations and the reproduction of the paper's tables."""
