"""The samplers by name: what the command line offers, the benchmarks compare and the tests check."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .options import DEFAULTS
from .scheduler import PlanScheduler


@dataclass(frozen=True)
class Sampler:
    """A scheduler class with options.

    Attributes:
        name: on the command line.
        scheduler: the class.
        options: what is set beside the class's defaults.
        order: stated order of convergence; of a stochastic sampler, of its drift.
        paper: source.
    """

    name: str
    scheduler: type[PlanScheduler]
    options: Mapping[str, Any]
    order: int
    paper: str

    @property
    def stochastic(self) -> bool:
        """Whether its plans read fresh noise."""
        solver = SAMPLERS.get(str(self.options.get("solver", "")))
        own = str(self.options.get("algorithm_type", "")).startswith("sde-")
        return own or (solver is not None and solver.stochastic)

    def build(self, config: Mapping[str, Any], **options: Any) -> PlanScheduler:
        """The scheduler for a model whose pipeline came with ``config``."""
        scheduler: PlanScheduler = self.scheduler.from_config(config, **{**self.options, **options})
        return scheduler

    def within(self, config: Mapping[str, Any], options: Mapping[str, Any] | None) -> PlanScheduler:
        """The scheduler as a part of another one, on the same model and with the same times.

        Args:
            config: of the other one. Its preset is left out, which was measured without it; and its ending, if it has
                none, is this sampler's.
            options: other values of this sampler's own options.

        Raises:
            ValueError: an option that this sampler does not have, or a value that it refuses.
        """
        options = options or {}
        own = [key for key in inspect.signature(self.scheduler).parameters if key not in DEFAULTS]
        unknown = sorted(set(options) - set(own))
        if unknown:
            raise ValueError(
                f"solver_options {unknown[0]!r} is no option of solver {self.name!r}; it has {', '.join(own)}"
            )
        shared = {key: config[key] for key in DEFAULTS if key != "preset"}
        if shared["final_sigmas_type"] is None:
            del shared["final_sigmas_type"]
        scheduler: PlanScheduler = self.scheduler(**shared, **{**self.options, **options})
        return scheduler


SAMPLERS: dict[str, Sampler] = {}
"""All samplers, in the order of registration."""


def register(name: str, scheduler: type[PlanScheduler], *, order: int, paper: str, **options: Any) -> None:
    """Adds a sampler; the command line, the benchmarks and the tests of invariants pick it up by themselves.

    Args:
        name: short and lower case.
        scheduler: its class.
        order: stated order of convergence.
        paper: source.
        options: of the class.

    Raises:
        ValueError: the name is taken.
    """
    if name in SAMPLERS:
        raise ValueError(f"a sampler called {name!r} is registered already")
    SAMPLERS[name] = Sampler(name, scheduler, options, order, paper)
