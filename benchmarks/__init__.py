"""Benchmarks: each prints one table, with peers or physical limits measured in the same run."""
