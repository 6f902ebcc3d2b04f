"""Fuzzing of everything that parses a file: `python -m tests.fuzz --executions 1000000 --jobs 2 --seed 0`.

A target is a function of bytes that may raise only the errors that it documents. Any other exception, a native
crash, more than five seconds of processor time, and more memory than the target's limit are findings.

    mutations.py   changes bytes; knows JSON, YAML, safetensors, npy, tar and compression
    targets.py     one target for each parser, with its seeds
    worker.py      the part of a target that runs in a worker process of the pipeline
    engine.py      runs targets in forked workers, keeps and shrinks findings
    coverage.py    the same targets, guided by coverage (atheris)
    findings/      inputs of earlier findings; the test suite replays them all
"""
