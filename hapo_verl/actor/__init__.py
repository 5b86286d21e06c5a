"""Runs in the actor's training process: engine, head, loss, likelihoods."""
