"""Finding the final answer in a completion and comparing it."""
