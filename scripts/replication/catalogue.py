"""All claims, in the order of the report."""

from __future__ import annotations

from . import fitted, solvers, steering, trajectories

CLAIMS = (*solvers.CLAIMS, *fitted.CLAIMS, *trajectories.CLAIMS, *steering.CLAIMS)
