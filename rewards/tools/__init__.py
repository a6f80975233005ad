"""What several rewards use and what is not a reward itself."""
