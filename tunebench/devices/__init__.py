"""Kinds of devices, one file each: what runs there, how one is found, what it can do."""
