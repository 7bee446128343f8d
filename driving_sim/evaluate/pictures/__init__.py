"""Measure the quality of pictures: against the true frames, over time, and as a set."""
