"""Stage train: a model from its first step to its last. It does not import MLflow."""
