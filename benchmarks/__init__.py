"""Benchmarks: each prints one table, with peers or physical limits beside us in the same run."""
