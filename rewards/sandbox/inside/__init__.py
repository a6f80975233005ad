"""What runs in the sandbox: the fork server, the program and the tests."""
