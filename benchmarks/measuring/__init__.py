"""Timing, peers, model sizes and machine limits that the benchmarks share."""
