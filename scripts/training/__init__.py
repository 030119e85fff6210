"""Recipes of the small models that the toolkit measures itself on."""
