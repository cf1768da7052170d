"""Memory, launches and clocks of a device."""
