"""What only people call: the `gptpipe` command. No stage depends on it."""
