"""Stage tokenize: documents to tokens."""
