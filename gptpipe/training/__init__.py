"""Advances a model from its first step to its last. Knows no MLflow."""
