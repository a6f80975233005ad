"""What `rlhub eval` and `rlhub reward test` do."""
