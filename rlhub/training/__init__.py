"""The loops and what they are made of: session, rollouts, grading, held-out accuracy, pairs, supervised batches."""
