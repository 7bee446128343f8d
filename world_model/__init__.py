"""Tokens + actions -> next tokens: transformer, cache, sampler, training, rollout."""
