"""``fewstep replicate``: the claims of the papers, measured again on the bundled models and exact mixtures."""
