"""IRModule -> executable, or sources and launches."""
