"""Train a model: loop, optimisers, schedule, checkpoints and logs, shared by both models."""
