"""Frames <-> tokens: FSQ, autoencoder, training, the frozen tokenizer, tokenize."""
