"""What stages pass to each other: documents, tokenizer, token streams."""
