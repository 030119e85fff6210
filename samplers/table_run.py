"""Runs of learned tables that begin where they first differ from a run that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .learned import LearnedTable
from .prediction import conversions
from .scheduler import PlanScheduler
from .trajectory import Network, asked, combined, limits_of
from .weights import Node


@dataclass(frozen=True)
class TableRun:
    """What a run went through: samples and predicted clean samples of its calls, and its end."""

    samples: list[torch.Tensor]
    cleans: list[torch.Tensor]
    end: torch.Tensor


class TableRunner:
    """Runs tables, from where they differ from a run that is known.

    Attributes:
        evaluations: of the network, counted for each sample.
    """

    def __init__(self, scheduler: PlanScheduler) -> None:
        self.scheduler = scheduler
        self.limits = limits_of(scheduler)
        self.evaluations = 0

    def run(
        self,
        table: LearnedTable,
        network: Network,
        start: torch.Tensor,
        known: TableRun | None = None,
        first: int = 0,
    ) -> TableRun:
        """The run of a table, whose calls before ``first`` are those of ``known``."""
        samples = [] if known is None else known.samples[:first]
        cleans = [] if known is None else known.cleans[:first]
        nodes = table.nodes(self.scheduler.schedule)
        x = self._next(table, nodes, samples, cleans) if samples else start
        for k in range(len(samples), table.calls):
            samples.append(x)
            cleans.append(self._clean(network, x, table.labels[k]))
            x = self._next(table, nodes, samples, cleans)
        return TableRun(samples, cleans, x)

    def _clean(self, network: Network, x: torch.Tensor, label: float) -> torch.Tensor:
        schedule, config = self.scheduler.schedule, self.scheduler.config
        level = float(schedule.level(label))
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(level))
        data, _ = conversions(schedule, config.prediction_type, level, alpha, sigma)
        assert data is not None
        self.evaluations += len(x)
        output = asked(self.scheduler, network, x, torch.tensor(label, dtype=torch.float32), schedule.in_scale(level))
        clean = x * data[0] + output.to(x.dtype) * data[1]
        return self.limits(clean) if self.limits else clean

    @staticmethod
    def _next(
        table: LearnedTable, nodes: Sequence[Node], samples: list[torch.Tensor], cleans: list[torch.Tensor]
    ) -> torch.Tensor:
        k = len(samples) - 1
        weights = [table.noise[k][j] / nodes[j].sigma for j in range(k + 1)]
        return combined(
            [*weights, *(table.data[k][j] - w * nodes[j].alpha for j, w in enumerate(weights))], [*samples, *cleans]
        )
