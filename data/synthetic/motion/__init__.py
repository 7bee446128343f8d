"""The moving parts of the synthetic world: the car, its driver and the traffic."""
