"""Stage evaluate: score the trained model, sample from it, report on it and register it."""
