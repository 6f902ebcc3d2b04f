"""Errors and exit codes, environment variables, console, locks and processes.

Nothing here changes a result, so no stage depends on it in dvc.yaml.
"""
