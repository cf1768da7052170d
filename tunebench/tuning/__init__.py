"""Search and decide."""
