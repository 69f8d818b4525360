"""Benches: ratios, each measured in one run."""
