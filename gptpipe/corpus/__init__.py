"""Text in, clean documents out. Knows neither tokens nor torch."""
