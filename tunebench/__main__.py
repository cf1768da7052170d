"""`python -m tunebench`."""

from tunebench.cli import main

main()
