"""Code that runs in verl's agent loop worker: the gate's decision, the demonstration's tokens, rewards."""
