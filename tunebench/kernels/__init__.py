"""What operations compute."""
