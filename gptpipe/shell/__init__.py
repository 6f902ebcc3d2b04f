"""Between the program and its machine: errors and exit codes, environment variables, console, processes.

Nothing here changes a result, so no stage depends on it in dvc.yaml.
"""
