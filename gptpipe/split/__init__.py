"""Stage split: whole documents to train, val and test, and how far they overlap."""
