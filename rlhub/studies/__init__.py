"""Experiments of several runs: arms and seeds, the variance of estimates, published claims in the laboratory."""
