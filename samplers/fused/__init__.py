"""A call of a plan in one pass over memory: Triton's kernel on CUDA, and what surrounds it."""
