"""One model end to end, its arms interleaved."""
