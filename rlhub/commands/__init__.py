"""The subcommand groups of `rlhub`, which `rlhub.cli` gathers: bench, lab, model, reward."""
