"""What steers a sampler: rewards, gradient guidance, populations of particles."""

__all__: list[str] = []
