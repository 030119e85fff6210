"""The command line ``fewstep``: generation, training of the bundled models, benchmarks."""
