"""What runs in the sandbox: the fork server, the program and the tests. Standard library only; see `rewards.sandbox`."""
