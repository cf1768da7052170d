"""Where candidate kernels are built, checked and timed, one module each."""
