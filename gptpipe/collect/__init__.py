"""Stage collect: text from all sources, cleaned, filtered and deduplicated."""
