"""Ways to build, check and time candidate kernels, one module each; `trials` says what they share."""
