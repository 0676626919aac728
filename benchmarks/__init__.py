"""Measurements of pagedkv beside its peers and the ceilings of the machine: `python -m benchmarks --help`."""
