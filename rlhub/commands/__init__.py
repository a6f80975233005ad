"""The subcommand groups of `rlhub`, which `rlhub.commands.main` gathers: bench, lab, model, reward."""
