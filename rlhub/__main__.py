"""`python -m rlhub`."""

from rlhub.commands.main import main

main()
