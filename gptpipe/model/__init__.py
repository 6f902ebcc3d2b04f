"""The network: integers in, logits out.

It knows no text, and of files only the Hugging Face layout of its weights.
"""
