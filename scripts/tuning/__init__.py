"""Fits of samplers to a model."""
