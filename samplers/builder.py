"""Where solvers write their plans: values with names nobody has to manage, compiled into rows and slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .grid import Grid
from .plan import NOISE, PREDICTION, SAMPLE, Call, Plan, Row
from .prediction import conversions
from .weights import Measure, Node

Terms = dict[int, float]


@dataclass(frozen=True)
class Value:
    """A tensor of the run, before it exists: the sample, a prediction, or a combination of values."""

    index: int


@dataclass
class _Segment:
    """A network call and the combinations between it and the next call.

    ``heard`` is where the label tells the network to be, which need not be where the sample is.
    """

    sample: int
    prediction: int
    node: Node
    level: float
    timestep: float
    measure: Measure
    heard: tuple[float, Node]
    combinations: list[tuple[int, Terms, float]] = field(default_factory=list)


class PlanBuilder:
    """Records what a solver does and compiles it.

    Combinations that only the same segment reads are substituted, values that a later segment reads get a
    slot, and slots are reused when their value is dead.

    Args:
        grid: the run's times.
        prediction_type: what the network predicts.
        start: first interval of the grid, for runs that begin in the middle.
        name: of the plan.
    """

    def __init__(self, grid: Grid, prediction_type: str, *, start: int = 0, name: str = "plan") -> None:
        if not 0 <= start < grid.steps:
            raise ValueError(f"start {start} lies outside the {grid.steps} steps of the grid")
        self.grid, self.prediction_type, self.start, self.name = grid, prediction_type, start, name
        self._segments: list[_Segment] = []
        self._count = 1

    @property
    def initial(self) -> Value:
        """The sample that the run begins with."""
        return Value(0)

    def evaluate(self, sample: Value, i: int, measure: Measure) -> Value:
        """Calls the network at grid node ``i``; returns its prediction in the given measure."""
        return self._evaluate(
            sample, self.grid.nodes[i], float(self.grid.levels[i]), float(self.grid.timesteps[i]), measure
        )

    def evaluate_at_rho(self, sample: Value, rho: float, measure: Measure) -> Value:
        """Calls the network between grid nodes, at ``sigma / alpha = rho``, with a fractional label."""
        level = self.grid.schedule.level_of_rho(rho)
        return self._evaluate(sample, self.node_at_rho(rho), level, float(self.grid.schedule.timestep(level)), measure)

    def evaluate_at_timestep(self, sample: Value, timestep: float, measure: Measure, *, level: float) -> Value:
        """Calls the network between grid nodes with a given label, at the noise level that it stands for."""
        alpha, sigma = self.grid.schedule.alpha_sigma(level)
        return self._evaluate(sample, Node(float(alpha), float(sigma)), level, timestep, measure)

    def evaluate_with_label(self, sample: Value, node: Node, level: float, timestep: float, measure: Measure) -> Value:
        """Calls the network at a sample of ``node`` with the label of another level, in whose terms it answers."""
        heard = float(self.grid.schedule.level(timestep))
        alpha, sigma = self.grid.schedule.alpha_sigma(heard)
        return self._evaluate(sample, node, level, timestep, measure, (heard, Node(float(alpha), float(sigma))))

    def node_at_rho(self, rho: float) -> Node:
        """The node with ``sigma / alpha = rho``."""
        alpha, sigma = self.grid.schedule.alpha_sigma(self.grid.schedule.level_of_rho(rho))
        return Node(float(alpha), float(sigma))

    def combine(self, terms: Iterable[tuple[Value, float]], *, noise: float = 0.0) -> Value:
        """A linear combination of values, plus ``noise`` times fresh Gaussian noise."""
        collected: Terms = {}
        for value, coefficient in terms:
            if coefficient != 0.0:
                collected[value.index] = collected.get(value.index, 0.0) + coefficient
        value = self._new()
        self._segments[-1].combinations.append((value.index, collected, noise))
        return value

    def finish(self, result: Value) -> Plan:
        """Compiles the recorded run, whose result is ``result`` at the grid's last node."""
        return _Compiler(self, result.index).compile()

    def _new(self) -> Value:
        self._count += 1
        return Value(self._count - 1)

    def _evaluate(
        self,
        sample: Value,
        node: Node,
        level: float,
        timestep: float,
        measure: Measure,
        heard: tuple[float, Node] | None = None,
    ) -> Value:
        prediction = self._new()
        place = (level, node) if heard is None else heard
        self._segments.append(_Segment(sample.index, prediction.index, node, level, timestep, measure, place))
        return prediction


class _Compiler:
    """Turns segments into calls."""

    def __init__(self, builder: PlanBuilder, result: int) -> None:
        self.builder, self.segments = builder, builder._segments
        # The value that each segment must hand over: the next call's sample, or the result.
        self.outputs = [s.sample for s in self.segments[1:]] + [result]
        self.last_use: dict[int, int] = {}
        for k, segment in enumerate(self.segments):
            for _, terms, _ in segment.combinations:
                for value in terms:
                    self.last_use[value] = k
        self.slot_of: dict[int, str] = {}
        self.free: list[str] = []
        self.allocated = 0

    def compile(self) -> Plan:
        calls = tuple(self._call(k, segment) for k, segment in enumerate(self.segments))
        grid = self.builder.grid
        end = grid.nodes[-1]
        return Plan(self.builder.name, calls, float(grid.levels[-1]), end.alpha, end.sigma)

    def _call(self, k: int, segment: _Segment) -> Call:
        written = self._rows_over_values(k, segment)
        names = {**self.slot_of, segment.sample: SAMPLE, segment.prediction: PREDICTION}
        before = set(self.slot_of.values())
        rows: list[Row] = []
        for number, (value, vector, noise) in enumerate(written):
            terms = tuple((names[v], c) for v, c in vector.items() if c != 0.0)
            # A slot may be written by the row that reads it last.
            self._release(k, keep={v for _, later, _ in written[number + 1 :] for v in later})
            out = SAMPLE if value is None else self._allocate(value)
            if value is not None:
                names[value] = out
            terms += ((NOISE, noise),) if noise else ()
            if not terms:
                raise ValueError(f"{out} after call {k} is always zero: the terms of its combination cancel")
            rows.append(Row(out, terms))
        self._release(k, keep=set())
        keep_sample = self._allocate(segment.sample) if self.last_use.get(segment.sample, -1) > k else None
        keep_prediction = self._allocate(segment.prediction) if self.last_use.get(segment.prediction, -1) > k else None
        drop = tuple(sorted(before - set(self.slot_of.values())))
        node, schedule = segment.node, self.builder.grid.schedule
        level, heard = segment.heard
        data, noise_pair = conversions(schedule, self.builder.prediction_type, level, heard.alpha, heard.sigma)
        pair = data if segment.measure == "data" else noise_pair
        if pair is None or data is None:
            raise ValueError(
                f"prediction_type {self.builder.prediction_type!r} cannot be sampled from alpha = 0 "
                f"(timestep {segment.timestep:g}): its clean sample is undefined there; start below the last level"
            )
        scale = schedule.in_scale(level)
        return Call(
            timestep=segment.timestep,
            level=segment.level,
            alpha=node.alpha,
            sigma=node.sigma,
            in_scale=scale,
            measure=segment.measure,
            prediction=pair,
            clean=data,
            keep_sample=keep_sample,
            keep_prediction=keep_prediction,
            rows=tuple(rows),
            drop=drop,
        )

    def _rows_over_values(self, k: int, segment: _Segment) -> list[tuple[int | None, Terms, float]]:
        """The combinations that must be computed, over values that exist; the one handed over has no number."""
        local: dict[int, tuple[Terms, float]] = {}
        written: list[tuple[int | None, Terms, float]] = []
        for value, terms, noise in segment.combinations:
            vector: Terms = {}
            for term, coefficient in terms.items():
                inner, inner_noise = local.get(term, ({term: 1.0}, 0.0))
                noise += coefficient * inner_noise
                for v, c in inner.items():
                    vector[v] = vector.get(v, 0.0) + coefficient * c
            local[value] = (vector, noise)
            if value == self.outputs[k]:
                written.append((None, vector, noise))
            elif self.last_use.get(value, -1) > k:
                written.append((value, vector, noise))
                local[value] = ({value: 1.0}, 0.0)
        return written

    def _release(self, k: int, keep: set[int]) -> None:
        """Frees the slots of values that nobody reads after this point of call ``k``."""
        for value in [v for v in self.slot_of if self.last_use.get(v, -1) <= k and v not in keep]:
            self.free.append(self.slot_of.pop(value))

    def _allocate(self, value: int) -> str:
        if self.free:
            slot = self.free.pop()
        else:
            slot = f"kept{self.allocated}"
            self.allocated += 1
        self.slot_of[value] = slot
        return slot
