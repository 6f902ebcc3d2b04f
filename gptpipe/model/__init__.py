"""The network: integers in, logits out. Knows neither text nor files, but for the layout that it is stored in."""
