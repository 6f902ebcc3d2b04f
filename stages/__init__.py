"""The pipeline's stages, one module each; dvc.yaml says what each reads and writes."""
