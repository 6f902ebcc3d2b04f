"""The fault campaign: the pipeline runs on a tiny project, disturbed by kills, power cuts, errors and damage.

project.py    the tiny project, its states between the stages, and how a stage is run in a forked process
faults.py     faults at a file operation: a signal, an error, a power cut
powercut.py   what a disk may contain after a power cut, computed from a trace of operations
damage.py     ways to damage a file that a stage reads
checks.py     what must hold after a fault and a rerun
trials.py     one function for each kind of trial
processes.py  trials with real processes: `dvc`, `dvc exp run`, a stage whose parent dies
worker.py     a process that has imported everything once and forks for each run of a stage
plan.py       the trials of a campaign
command.py    `python -m tests.campaign`
"""
