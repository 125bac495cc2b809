"""Measurements behind `scripts/benchmark.py`: ratios within one run, medians, spread."""
