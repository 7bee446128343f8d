"""How many bits a model needs for what it sees: per token, coded, without actions, by place."""
