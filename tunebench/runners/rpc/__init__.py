"""Devices at TVM's tracker: a runner here, a process for each device."""
