"""What is run: architectures, schemes, weights."""
