"""What moves in the synthetic world: the car, its driver and the traffic."""
