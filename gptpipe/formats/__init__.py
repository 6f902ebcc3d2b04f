"""What stages pass to each other: documents, sides, tokenizer, token shards, token streams."""
