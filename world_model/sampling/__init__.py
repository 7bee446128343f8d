"""Drawing tokens from the model's logits, wave by wave."""
