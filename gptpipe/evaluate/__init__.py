"""Stage evaluate: score, sample, report and register the trained model."""
