"""Model folders in and out: weights, adapters, tokenizers, the sealed checkpoints of a run, export."""
