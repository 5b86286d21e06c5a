"""Code that runs on the trainer's driver: trainers, gatekeeper, mini-batches, metrics, the watch."""
