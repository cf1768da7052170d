"""What can prefill and decode."""
