"""Timings of the ops against the ways people write them today. ``python -m benchmarks --help``."""
