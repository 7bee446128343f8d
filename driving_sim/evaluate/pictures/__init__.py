"""How good pictures are: beside the truth, over time, and as a set."""
