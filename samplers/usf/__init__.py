"""USF and S^3 (arXiv 2312.07243): solvers that differ from step to step, and the search for them."""
