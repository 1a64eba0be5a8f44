"""Using a compressed checkpoint."""
