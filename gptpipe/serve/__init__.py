"""`gptpipe serve`: models behind the part of OpenAI's HTTP interface that a model without chat has."""
