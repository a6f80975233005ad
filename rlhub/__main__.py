"""`python -m rlhub`."""

from rlhub.cli import main

main()
