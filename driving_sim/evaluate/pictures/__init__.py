"""How good pictures are: compared with the truth, over time, and as a set."""
