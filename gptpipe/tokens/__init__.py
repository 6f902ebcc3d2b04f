"""Documents in, token streams and batches out."""
