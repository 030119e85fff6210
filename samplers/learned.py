"""Learned plans: a run as a table of numbers that were fitted to a model, as a diffusers scheduler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from .builder import PlanBuilder
from .fixed_times import FixedTimesScheduler
from .grid import Grid
from .json_fields import fields_of, numbers
from .options import ScheduleConfig, scheduler_options
from .plan import NOISE, PREDICTION, SAMPLE, Plan
from .schedule import NoiseSchedule
from .weights import Node

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FORMAT = "fewstep.learned"
_VERSION = 1
_TOLERANCE = 1e-6

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LearnedTable:
    """Every plan whose steps are linear in what the network said so far, as numbers.

    At call ``k`` the network sees ``scale_k (alpha_k x_0 + sigma_k noise)`` with a label that may stand for another
    level, and tells the clean sample ``x0_k``; the noise is ``eps_k = (sample / scale_k - alpha_k x0_k) / sigma_k``.
    The next sample is ``sum_j data[k][j] x0_j + noise[k][j] eps_j`` over all calls so far. The rows' sums are ``scale
    alpha`` and ``scale sigma`` of the next level: a model that is sure of one image is followed exactly.

    Attributes:
        levels: N + 1 decreasing noise levels, in diffusers' ``sigmas`` units.
        labels: N time labels for the network.
        scales: N factors on the samples; the first is 1.
        data: N rows of coefficients of the predicted clean samples; row ``k`` has ``k + 1``.
        noise: the same for the predicted noises.
    """

    levels: tuple[float, ...]
    labels: tuple[float, ...]
    scales: tuple[float, ...]
    data: Rows
    noise: Rows

    @property
    def calls(self) -> int:
        """Number of network calls."""
        return len(self.labels)

    def nodes(self, schedule: NoiseSchedule) -> list[Node]:
        """``alpha`` and ``sigma`` of every sample, the factors included."""
        alpha, sigma = schedule.alpha_sigma(self.levels)
        factors = (*self.scales, 1.0)
        return [Node(r * float(a), r * float(s)) for r, a, s in zip(factors, alpha, sigma, strict=True)]

    def check(self, schedule: NoiseSchedule) -> None:
        """Refuses a table that no model of the schedule can be sampled with.

        Raises:
            ValueError: sizes, numbers or sums that are wrong, naming them.
        """
        calls = len(self.labels)
        sizes = [len(self.levels) - 1, len(self.scales), len(self.data), len(self.noise)]
        shapes = [len(row) == k + 1 for rows in (self.data, self.noise) for k, row in enumerate(rows)]
        if calls < 1 or any(size != calls for size in sizes) or not all(shapes):
            raise ValueError(
                f"table has {calls} labels, and then needs {calls + 1} levels, {calls} scales and {calls} rows of data "
                f"and of noise with 1 to {calls} numbers; fit it again"
            )
        numbers = [*self.levels, *self.labels, *self.scales, *(c for row in (*self.data, *self.noise) for c in row)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("table has numbers that are not finite; fit it again")
        if self.scales[0] != 1.0 or min(self.scales) <= 0.0:
            raise ValueError(f"table: scales {self.scales} must be positive and begin with 1")
        Grid.of(schedule, self.levels, self.labels)
        for k, node in enumerate(self.nodes(schedule)[1:]):
            for name, row, wanted in (("data", self.data[k], node.alpha), ("noise", self.noise[k], node.sigma)):
                if abs(math.fsum(row) - wanted) > _TOLERANCE * (1.0 + sum(map(abs, row))):
                    raise ValueError(
                        f"table: row {k} of {name} sums to {math.fsum(row):.6g}, not to {wanted:.6g}; it belongs to "
                        "another noise schedule, or is damaged"
                    )

    @classmethod
    def of(cls, plan: Plan) -> LearnedTable:
        """The table of any deterministic sampler's plan, predictors, correctors and stages alike.

        Raises:
            ValueError: the plan reads noise, or visits a level twice, as Runge-Kutta methods do.
        """
        levels = (*(call.level for call in plan), plan.final_level)
        if any(after >= before for before, after in itertools.pairwise(levels)):
            raise ValueError(f"plan {plan.name!r} visits a level twice; use a multistep or singlestep sampler")
        if plan.is_stochastic:
            raise ValueError(
                f"plan {plan.name!r} reads fresh noise, which a table has no place for; use an ODE sampler"
            )
        size = 2 * len(plan)
        slots: dict[str, np.ndarray] = {}
        data, noise = [], []
        for k, call in enumerate(plan):
            clean, eps = np.zeros(size), np.zeros(size)
            clean[2 * k], eps[2 * k + 1] = 1.0, 1.0
            values = {
                **slots,
                SAMPLE: call.alpha * clean + call.sigma * eps,
                PREDICTION: clean if call.measure == "data" else eps,
            }
            following = values[SAMPLE]
            for row in call.rows:
                result = sum((c * values[slot] for slot, c in row.terms if slot != NOISE), np.zeros(size))
                if row.out == SAMPLE:
                    following = result
                else:
                    values[row.out] = result
            for slot, source in ((call.keep_sample, SAMPLE), (call.keep_prediction, PREDICTION)):
                if slot is not None:
                    values[slot] = values[source]
            slots = {slot: value for slot, value in values.items() if slot not in (SAMPLE, PREDICTION, *call.drop)}
            data.append(tuple(following[0 : 2 * k + 2 : 2].tolist()))
            noise.append(tuple(following[1 : 2 * k + 2 : 2].tolist()))
        labels = tuple(call.timestep for call in plan)
        return cls(levels, labels, (1.0,) * len(plan), tuple(data), tuple(noise))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, exact."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LearnedTable:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: another format or version, or missing or wrong fields.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT or data.get("version") != _VERSION:
            raise ValueError(f"table is no learned table of version {_VERSION}: {data!s:.80}")
        found = fields_of(data, "table", [field.name for field in fields(cls)], ("format", "version"))
        levels, labels, scales = (numbers(found[name], f"{name} of table") for name in ("levels", "labels", "scales"))
        rows = []
        for name in ("data", "noise"):
            if not isinstance(found[name], (list, tuple)):
                raise ValueError(f"{name} of table is {found[name]!r:.80}; give rows of numbers")
            rows.append(tuple(numbers(row, f"row {k} of {name} of table") for k, row in enumerate(found[name])))
        return cls(levels, labels, scales, rows[0], rows[1])


class LearnedScheduler(FixedTimesScheduler):
    """A run whose times, labels and coefficients were fitted to a model, by ``fit_plan``.

    They are kept in the config, and are refused for another number of calls or another noise schedule. The config's
    options of times (spacings, shifts, endings) have no effect. Fitting times is LD3 (arXiv 2405.15506) and fitting
    coefficients S4S (arXiv 2502.17423); the table has room for both at once, for labels apart from levels, for scales,
    and for the whole history in both predictions. A run that begins in the middle (image to image) puts its first
    prediction in the place of those that it lacks.

    Args:
        table: ``LearnedTable``, or its ``to_dict()``.
        schedule: options of ``ScheduleConfig``.

    Raises:
        ValueError: no or a damaged table, or one of another kind of model.
    """

    _remedy = "fit a plan for that number"

    @scheduler_options()
    def __init__(
        self, *, table: LearnedTable | Mapping[str, Any] | None = None, **schedule: Unpack[ScheduleConfig]
    ) -> None:
        if table is None:
            raise ValueError("table is missing: it is fitted to a model; make one with fit_plan")
        if not isinstance(table, LearnedTable):
            table = LearnedTable.from_dict(table)
        self.register_to_config(table=table.to_dict())
        self.table, self._made_for = table, table.calls
        self._setup()
        table.check(self.schedule)

    def _times_of_run(self) -> Grid:
        return Grid.of(self.schedule, self.table.levels, self.table.labels)

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        table, first = self.table, plan.start
        sample, samples, cleans = plan.initial, [], []
        nodes = table.nodes(self.schedule)
        # Whoever starts in the middle hands over a sample without the factor,
        nodes[first] = plan.grid.nodes[first]
        for k in range(first, table.calls):
            samples.append(sample)
            cleans.append(plan.evaluate_with_label(sample, nodes[k], table.levels[k], table.labels[k], "data"))
            terms = []
            for j, (seen, clean) in enumerate(zip(samples, cleans, strict=True), first):
                # and its first prediction stands for those that it lacks: the sums stay.
                told = slice(0, j + 1) if j == first else slice(j, j + 1)
                data, noise = math.fsum(table.data[k][told]), math.fsum(table.noise[k][told])
                weight = noise / nodes[j].sigma
                terms += [(seen, weight), (clean, data - weight * nodes[j].alpha)]
            sample = plan.combine(terms)
        return plan.finish(sample)
