"""verl's trainer and vLLM on a machine without a GPU."""
