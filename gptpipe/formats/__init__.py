"""What stages pass to each other: documents (`corpus`), tokens (`token_shards`, `tokenizer`), streams of a split."""
