"""Benchmarks: each prints one table, with peers or physical limits measured in the same run."""

from gptpipe.shell.environment import limit_busy_waiting

limit_busy_waiting()  # as every command of gptpipe does; here, because it must precede the import of torch
