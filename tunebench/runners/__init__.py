"""Ways to build, check and time candidate kernels, one module each; `base` says what they share."""
