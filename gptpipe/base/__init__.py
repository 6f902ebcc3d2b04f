"""Used by every stage: durable files, manifests, parameters, Parquet, parallel work, pages."""
