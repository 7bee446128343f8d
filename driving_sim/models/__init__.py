"""The packaged models. Each folder is the run folder of a world model, found by its name."""
