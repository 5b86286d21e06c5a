"""Code that runs in the actor's training process: engine, head, loss, likelihoods."""
