"""Measurements of samplers: cost of a step, order of convergence, accuracy a network call."""
