"""Tasks of lm-evaluation-harness: which there are, what they ask, and tasks of the user."""
