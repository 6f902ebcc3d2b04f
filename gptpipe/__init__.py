"""gptpipe: train a GPT from scratch, reproducibly."""

__version__ = "0.1.0"
