"""What only measures. Not installed: run ``python -m benchmarks`` from the root of a checkout."""
