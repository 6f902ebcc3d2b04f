"""What every stage needs: durable files, manifests, parameters, Parquet, parallel work, pages."""
