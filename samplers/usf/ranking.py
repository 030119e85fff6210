"""The performance predictor of S^3 (arXiv 2312.07243): which of two solver schedules will sample better.

The predictor of S^3 was not released; this is that of OMS-DPM (arXiv 2306.08860, section 4.3), by the same authors: an
LSTM over the steps, trained on pairs with a hinge loss, so that only the order of the scores means something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .decisions import MAX_ORDER, RELAXATIONS, SolverSchedule, SolverStep

_WIDEST = 10.0
_MEASURES = ("data", "noise")
_CORRECTORS = ("none", "pseudo", "implicit")


@dataclass(frozen=True)
class RankingSettings:
    """How the predictor is built and trained; the defaults are those of OMS-DPM but for the number of epochs.

    Attributes:
        time_embedding: size of the sinusoidal embedding of a level, and of what a perceptron makes of it.
        order_embedding: size of the embedding of the Taylor order.
        decision_hidden: size of the perceptron over the other decisions.
        hidden: of the LSTM.
        head: sizes of the perceptron that gives the score.
        epochs: passes over all schedules.
        batch: schedules at a time.
        learning_rate: of Adam.
        margin: of the hinge.
        threshold: pairs whose fitnesses differ by a smaller ratio are no pairs.
        pairs: at most so many a schedule in an epoch.
    """

    time_embedding: tuple[int, int] = (128, 64)
    order_embedding: int = 16
    decision_hidden: int = 64
    hidden: int = 128
    head: tuple[int, ...] = (200, 200, 200)
    epochs: int = 120
    batch: int = 512
    learning_rate: float = 1e-3
    margin: float = 1.0
    threshold: float = 0.02
    pairs: int = 2


class RankingPredictor(nn.Module):
    """Scores solver schedules; a lower score means a better one.

    Args:
        settings: of its sizes.
        seed: of its weights.
    """

    def __init__(self, settings: RankingSettings | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings or RankingSettings()
        wide, narrow = self.settings.time_embedding
        hidden = self.settings.decision_hidden
        # Module initialisers draw from the global generator, which is the caller's.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.time = nn.Sequential(nn.Linear(wide, narrow), nn.SiLU(), nn.Linear(narrow, narrow))
            self.order = nn.Embedding(MAX_ORDER + 1, self.settings.order_embedding)
            self.decisions = nn.Sequential(nn.Linear(_DECISIONS, hidden), nn.Sigmoid(), nn.Linear(hidden, hidden))
            inputs = 2 * narrow + self.settings.order_embedding + hidden
            self.sequence = nn.LSTM(inputs, self.settings.hidden, batch_first=True)
            layers: list[nn.Module] = []
            size = self.settings.hidden
            for width in self.settings.head:
                layers += [nn.Linear(size, width), nn.ReLU()]
                size = width
            self.head = nn.Sequential(*layers, nn.Linear(size, 1))

    def forward(self, batch: ScheduleBatch) -> torch.Tensor:
        """Scores, ``(batch,)``."""
        times = self.time(_sinusoidal(batch.times, self.settings.time_embedding[0]))
        parts = [times[:, :-1], times[:, 1:], self.order(batch.orders), self.decisions(batch.decisions)]
        outputs, _ = self.sequence(torch.cat(parts, dim=-1))
        # Steps behind a schedule's end come after all of its own, so they change none of them.
        present = (batch.orders > 0).unsqueeze(-1)
        mean = (nn.functional.normalize(outputs, dim=-1) * present).sum(1) / present.sum(1)
        scores: torch.Tensor = self.head(nn.functional.normalize(mean, dim=-1)).squeeze(-1)
        return scores

    @torch.no_grad()
    def score(self, schedules: Sequence[SolverSchedule]) -> list[float]:
        """One score a schedule, the lowest for the best."""
        scores: list[float] = self(ScheduleBatch.of(schedules)).tolist()
        return scores

    def fit(self, schedules: Sequence[SolverSchedule], fitness: Sequence[float], *, seed: int = 0) -> float:
        """Trains on evaluated schedules.

        Args:
            schedules: the schedules.
            fitness: of each, lower is better, positive; infinity is allowed.
            seed: of the batches and pairs.

        Returns:
            the mean loss of the last epoch; 0 where no pair differs enough to be one.
        """
        settings = self.settings
        data = ScheduleBatch.of(schedules)
        worst = max((value for value in fitness if math.isfinite(value)), default=1.0)
        # What diverged is worse than all others, and no further apart.
        values = torch.tensor([value if math.isfinite(value) else 2.0 * worst for value in fitness]).clamp(min=1e-30)
        logs = values.double().log()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.parameters(), lr=settings.learning_rate)
        loss_of_epoch = 0.0
        for _ in range(settings.epochs):
            losses = []
            for chosen in torch.randperm(len(schedules), generator=generator).split(settings.batch):
                first, second = self._pairs(logs[chosen], generator)
                if len(first) == 0:
                    continue
                scores = self(data.select(chosen))
                sign = (logs[chosen[first]] > logs[chosen[second]]).float() * 2.0 - 1.0
                loss = (settings.margin - sign * (scores[first] - scores[second])).clamp(min=0.0).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            loss_of_epoch = sum(losses) / len(losses) if losses else 0.0
        return loss_of_epoch

    def _pairs(self, logs: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random pairs that differ enough."""
        count = len(logs)
        first = torch.arange(count).repeat(self.settings.pairs)
        second = torch.randint(count, (len(first),), generator=generator)
        kept = (logs[first] - logs[second]).abs() > math.log1p(self.settings.threshold)
        return first[kept], second[kept]


@dataclass(frozen=True)
class ScheduleBatch:
    """Schedules as tensors, padded to the longest.

    Attributes:
        times: half log-SNR of the nodes, ``(batch, steps + 1)``, infinities cut.
        orders: Taylor orders, ``(batch, steps)``; 0 behind a schedule's end.
        decisions: the other decisions, ``(batch, steps, features)``.
    """

    times: torch.Tensor
    orders: torch.Tensor
    decisions: torch.Tensor

    @classmethod
    def of(cls, schedules: Sequence[SolverSchedule]) -> ScheduleBatch:
        """Encodes schedules."""
        longest = max(len(schedule.steps) for schedule in schedules)
        times = torch.zeros(len(schedules), longest + 1)
        orders = torch.zeros(len(schedules), longest, dtype=torch.long)
        decisions = torch.zeros(len(schedules), longest, _DECISIONS)
        for row, schedule in enumerate(schedules):
            count = len(schedule.steps)
            logs = [min(max(value, -_WIDEST), _WIDEST) for value in schedule.half_logsnr]
            times[row, : count + 1] = torch.tensor(logs)
            orders[row, :count] = torch.tensor([step.order for step in schedule.steps])
            features = [_features(step, schedule.afs != "none" and i == 0) for i, step in enumerate(schedule.steps)]
            decisions[row, :count] = torch.tensor(features)
        return cls(times, orders, decisions)

    def select(self, rows: torch.Tensor) -> ScheduleBatch:
        """Some of the schedules."""
        return ScheduleBatch(self.times[rows], self.orders[rows], self.decisions[rows])


def _features(step: SolverStep, analytic: bool) -> list[float]:
    first = step.derivatives[0] if step.derivatives else None
    correction = step.correction
    corrector = "none" if correction is None else "implicit" if correction.implicit else "pseudo"
    relaxation = "none" if first is None else first.relaxation
    return [
        *(float(step.measure == name) for name in _MEASURES),
        *(float(corrector == name) for name in _CORRECTORS),
        *(float(relaxation == name) for name in RELAXATIONS),
        0.0 if first is None else first.coefficient,
        0.0 if first is None else float(len(first.active_points)),
        float(-1 - step.start),
        float(analytic),
    ]


_DECISIONS = len(_MEASURES) + len(_CORRECTORS) + len(RELAXATIONS) + 4


def _sinusoidal(values: torch.Tensor, size: int) -> torch.Tensor:
    """Sines and cosines of geometrically falling frequencies, as of timesteps; ``(..., size)``."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(size // 2) / (size // 2))
    angles = 100.0 * values.unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
