"""What both models share: configuration, training, checkpoints, logging, errors, safe files."""
