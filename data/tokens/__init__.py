"""The token store: drives as tokens and actions, in shards, for training and evaluation."""
