"""The recipe: its schema with every default, reading it from YAML, and what its keys must fit together."""
