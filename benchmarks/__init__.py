"""What fedlora exists for, measured as ratios in one run: `python -m benchmarks`."""
