"""The record: MLflow's tracking store and model registry. The only room that imports mlflow, which takes seconds."""
