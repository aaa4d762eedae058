"""Benchmarks of ops, train step and generation: `python -m benchmarks --help`."""
