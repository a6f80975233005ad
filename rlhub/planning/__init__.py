"""What a recipe will do and cost, before it does it; needs no GPU, Ray or DeepSpeed."""
