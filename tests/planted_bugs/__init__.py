"""Bugs planted on purpose, one at a time, each of which named tests must catch: `python -m tests.planted_bugs`.

    bugs.py        the list: a small textual change of one file, and the tests that must fail with it
    __main__.py    plants each bug in a copy of the project, runs its tests and reports what survived

The test suite only checks that each change still applies.
"""
