"""The model of a diffusers pipeline as a function of sample and time."""
