"""Code that both models share: configs, training, checkpoints, logs, errors and atomic files."""
