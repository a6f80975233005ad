"""The command line, one module a command; `main` gathers them.

A command imports what it needs when it runs, so that `--help` and `plan` start at once.
"""

INTERRUPTED = 130  # the exit code: 128 + SIGINT, as shells have it
