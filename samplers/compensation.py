"""The search for the ratios of DC-Solver (arXiv 2409.03755, section 3.2): step by step towards a fine trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.polynomial import Polynomial

from .builder import PlanBuilder
from .dc_solver import DCSolverScheduler
from .plan import Call, Plan
from .trajectory import Network, Trajectory, combined, fine_trajectory, grid_of, network_output, run_of

SearchMethod = Literal["forward", "gradient"]

_CLOSE = 1e-3


@dataclass(frozen=True)
class RatioSearch:
    """What ``search_ratios`` found.

    Attributes:
        ratios: one a step, for ``DCSolverScheduler(ratios=...)``.
        errors: root mean square distance to the trajectory after every step, with these ratios.
        calls: of the network, without the trajectory's.
    """

    ratios: list[float]
    errors: list[float]
    calls: int


def search_ratios(
    scheduler: DCSolverScheduler,
    network: Network,
    noise: torch.Tensor,
    *,
    truth: Trajectory | None = None,
    method: SearchMethod = "forward",
    bounds: tuple[float, float] | None = (0.5, 1.5),
    evaluations: int = 8,
    iterations: int = 40,
    refinement: int = 0,
    progress: Callable[[int, float, float], None] | None = None,
) -> RatioSearch:
    """Finds the compensation ratio of every step of a run, one after the other, by the distance to a fine trajectory.

    Without a corrector the result of a step is a polynomial in its ratio, and its squared distance one of degree
    ``2 dc_order``, whose minimum is taken exactly, without network calls. With a corrector the network is evaluated at
    the result, and the minimum found from a parabola through the three best results: about 5 calls a step.

    Args:
        scheduler: with its timesteps set; its own ratios are ignored.
        network: the model.
        noise: ``(batch, ...)`` standard normal; about 10 samples suffice. Memory for all of them at once is needed
            (with ``"gradient"``, for the activations too).
        truth: from ``fine_trajectory`` with the same noise; of 200 steps by default.
        method: ``"forward"`` as above; ``"gradient"`` is the paper's: AdamW with rate 0.1 and its default decay,
            through the network.
        bounds: of the ratios. The gradient method keeps them by a hyperbolic tangent, as the authors' code does
            on request; ``None`` is their default.
        evaluations: network calls a step, at most (``"forward"``).
        iterations: of AdamW a step (``"gradient"``).
        refinement: runs in which all ratios are then adjusted together to the distance at the end alone, by
            Nelder and Mead's simplex; 0 is the paper's method, 40 gain a few percent.
        progress: called after every step with its index, ratio and error.

    Raises:
        ValueError: no timesteps were set, a truth of another run, or a network that does not return finite numbers.
    """
    if method not in ("forward", "gradient"):
        raise ValueError(f"method {method!r} is unknown; use forward or gradient")
    if bounds is not None and not bounds[0] < 1.0 < bounds[1]:
        raise ValueError(f"bounds {bounds} must lie on both sides of 1, the ratio that changes nothing")
    if evaluations < 3:
        raise ValueError(f"evaluations {evaluations} must be at least 3: a parabola needs 3 results")
    if iterations < 1 or refinement < 0:
        raise ValueError(f"iterations {iterations} must be at least 1, and refinement {refinement} at least 0")
    grid = grid_of(scheduler)
    truth = truth or fine_trajectory(scheduler, network, noise, steps=max(200, grid.steps))
    start = noise * scheduler.init_noise_sigma
    if truth.grid.levels[0] != grid.levels[0] or not torch.equal(truth.samples[0], start):
        raise ValueError("truth begins with other noise or at another level than the run; make it with fine_trajectory")

    def best(step: _Step) -> float:
        if not step.changes:
            return 1.0
        if method == "gradient":
            return _descend(step, bounds, iterations)
        return _scan(step, bounds, evaluations) if step.corrects else step.exact(bounds)

    with torch.no_grad():
        found = _walk(scheduler, network, truth, best, progress)
        if refinement:
            ratios, runs = _refined(scheduler, network, truth, found.ratios, bounds, refinement)
            again = _walk(scheduler, network, truth, lambda step: ratios[step.index], None)
            found = RatioSearch(again.ratios, again.errors, found.calls + runs * grid.steps + again.calls)
    return found


def _walk(
    scheduler: DCSolverScheduler,
    network: Network,
    truth: Trajectory,
    choose: Callable[[_Step], float],
    progress: Callable[[int, float, float], None] | None,
) -> RatioSearch:
    """The run with ratios that are chosen on the way."""
    grid = grid_of(scheduler)
    found = RatioSearch([], [], 0)
    outputs: list[torch.Tensor] = []
    for i in range(grid.steps):
        target = truth.at(float(grid.levels[i + 1]))
        step = _Step(scheduler, network, truth.samples[0], found.ratios, outputs, target)
        ratio = choose(step)
        error = math.sqrt(step.distance(ratio))
        outputs = step.outputs
        if step.corrects:
            outputs.append(step.known[ratio])
        found = RatioSearch([*found.ratios, ratio], [*found.errors, error], found.calls + step.calls)
        if progress is not None:
            progress(i, ratio, error)
    return found


def _refined(
    scheduler: DCSolverScheduler,
    network: Network,
    truth: Trajectory,
    ratios: list[float],
    bounds: tuple[float, float] | None,
    runs: int,
) -> tuple[list[float], int]:
    """Ratios near the given ones, and none worse, for the distance at the end; and how many runs that took."""
    from scipy.optimize import minimize

    steps, start = len(ratios), truth.samples[0]
    target = truth.at(float(grid_of(scheduler).levels[-1]))

    def with_ratio(i: int, ratio: float) -> list[float]:
        return [*ratios[:i], ratio, *ratios[i + 1 :]]

    free = [
        i
        for i in range(steps)
        if len({_plan_to(scheduler, with_ratio(i, ratio), steps).calls for ratio in (0.75, 1.25)}) > 1
    ]
    if not free:
        return ratios, 0

    def completed(values: np.ndarray) -> list[float]:
        chosen = dict(zip(free, values.tolist(), strict=True))
        return [chosen.get(i, ratio) for i, ratio in enumerate(ratios)]

    def distance(values: np.ndarray) -> float:
        plan = _plan_to(scheduler, completed(values), steps)
        run, x = run_of(scheduler, plan), start
        for call in plan:
            x, _ = run.step(x, network_output(scheduler, network, x, call), clean=False)
        value = float((x - target).double().square().mean())
        return value if math.isfinite(value) else math.inf

    box = None if bounds is None else [bounds] * len(free)
    options = {"maxfev": runs, "xatol": _CLOSE, "fatol": 0.0}
    result = minimize(distance, [ratios[i] for i in free], method="Nelder-Mead", bounds=box, options=options)
    return completed(result.x), result.nfev


class _Step:
    """A step of the run under search: its result as a function of its ratio.

    The plan is linear in what the network returned, and its coefficients are polynomials in the ratio: plans for a few
    ratios give the result for every other one.

    Args:
        scheduler: of the run.
        network: the model.
        start: the run's initial samples.
        ratios: of the steps before.
        outputs: of the network at the nodes before, and if it is known at this one.
        target: where the step should end.
    """

    def __init__(
        self,
        scheduler: DCSolverScheduler,
        network: Network,
        start: torch.Tensor,
        ratios: Sequence[float],
        outputs: Sequence[torch.Tensor],
        target: torch.Tensor,
    ) -> None:
        self._scheduler, self._network, self._target = scheduler, network, target
        self.outputs, self.calls = list(outputs), 0
        self.known: dict[float, torch.Tensor] = {}
        self.index = i = len(ratios)
        self._points = [float(v) for v in np.linspace(0.5, 1.5, 1 + scheduler.config.dc_order)]
        plans = [_plan_to(scheduler, [*ratios, ratio], i + 1) for ratio in self._points]
        self.changes = plans[0].calls != plans[-1].calls
        if not self.changes:
            self._points, plans = [1.0], plans[:1]
        self._next: Call | None = plans[0].calls[i + 1] if len(plans[0]) > i + 1 else None
        self._runs = [run_of(scheduler, plan) for plan in plans]
        self._ends = []
        for run, plan in zip(self._runs, plans, strict=True):
            x = start
            for k in range(i + 1):
                if k == len(self.outputs):
                    self.outputs.append(self._evaluate(x, plan.calls[k]))
                x, _ = run.step(x, self.outputs[k], clean=False)
            self._ends.append(x)

    @property
    def corrects(self) -> bool:
        """Whether the result depends on the network at the step's end."""
        return self._next is not None

    def residual(self, ratio: float | torch.Tensor) -> torch.Tensor:
        """Result minus target."""
        weights = _lagrange(ratio, self._points)
        x = combined(weights, self._ends)
        if self._next is not None:
            if isinstance(ratio, float):
                if ratio not in self.known:
                    self.known[ratio] = self._evaluate(x, self._next)
                output = self.known[ratio]
            else:
                output = self._evaluate(x, self._next)
                if not output.requires_grad:
                    raise ValueError("network returns no gradient; drop its torch.no_grad, or use method='forward'")
            ends = []
            for run in self._runs:
                ends.append(run.step(x, output, clean=False)[0])
                run.undo()
            x = combined(weights, ends)
        return x - self._target

    def distance(self, ratio: float) -> float:
        """Mean squared distance of the result from the target.

        Raises:
            ValueError: it is not finite.
        """
        value = float(self.residual(ratio).double().square().mean())
        if not math.isfinite(value):
            raise ValueError(f"the run is not finite with a ratio of {ratio:g}; check network, noise and truth")
        return value

    def exact(self, bounds: tuple[float, float] | None) -> float:
        """The best ratio of a step without corrector."""
        return _best_ratio(self._points, [end - self._target for end in self._ends], bounds)

    def _evaluate(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        self.calls += 1
        return network_output(self._scheduler, self._network, x, call)


def _scan(step: _Step, bounds: tuple[float, float] | None, evaluations: int) -> float:
    """The best ratio of a step with corrector: the minimum of the parabola through the three best results, repeated."""
    low, high = bounds or (0.5, 1.5)
    losses = {ratio: step.distance(ratio) for ratio in (1.0, low, high)}
    while len(losses) < evaluations:
        points = sorted(losses, key=lambda ratio: losses[ratio])[:3]
        ratio = _best_ratio(points, [step.residual(point) for point in points], bounds)
        if min(abs(ratio - point) for point in losses) < _CLOSE:
            break
        losses[ratio] = step.distance(ratio)
    return min(losses, key=lambda ratio: losses[ratio])


def _descend(step: _Step, bounds: tuple[float, float] | None, iterations: int) -> float:
    """The authors' optimiser."""

    def bounded(parameter: torch.Tensor) -> torch.Tensor:
        return parameter if bounds is None else middle + half * torch.tanh(parameter)

    initial = 1.0
    if bounds is not None:
        middle, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
        initial = math.atanh((1.0 - middle) / half)
    with torch.enable_grad():
        parameter = torch.tensor(initial, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        for _ in range(iterations):
            optimizer.zero_grad()
            step.residual(bounded(parameter)).square().mean().backward()
            optimizer.step()
    return float(bounded(parameter).detach())


def _best_ratio(
    points: Sequence[float], residuals: Sequence[torch.Tensor], bounds: tuple[float, float] | None
) -> float:
    """Where the polynomial through the residuals is the shortest; 1 where nothing is shorter."""
    flat = torch.stack([residual.double().flatten() for residual in residuals])
    gram = (flat @ flat.T).cpu().numpy()
    # Around 1, for the digits.
    shifted = [point - 1.0 for point in points]
    basis = [
        math.prod(
            (Polynomial([-other, 1.0]) / (own - other) for l, other in enumerate(shifted) if l != k),
            start=Polynomial([1.0]),
        )
        for k, own in enumerate(shifted)
    ]
    loss = sum((a * b * gram[j, k] for j, a in enumerate(basis) for k, b in enumerate(basis)), start=Polynomial([0.0]))
    # A real part that belongs to no real root is a candidate like any other.
    candidates = [0.0, *loss.deriv().roots().real.tolist()]
    if bounds is not None:
        candidates = [*(c for c in candidates if bounds[0] <= 1.0 + c <= bounds[1]), *(b - 1.0 for b in bounds)]
    return 1.0 + float(min(candidates, key=loss))


def _lagrange(at: float | torch.Tensor, points: Sequence[float]) -> list[float | torch.Tensor]:
    """The Lagrange basis on the points; a tensor keeps its gradient."""
    return [
        math.prod(((at - other) / (own - other) for l, other in enumerate(points) if l != k), start=1.0)
        for k, own in enumerate(points)
    ]


def _plan_to(scheduler: DCSolverScheduler, ratios: Sequence[float], node: int) -> Plan:
    """The plan of the run up to a node."""
    grid = grid_of(scheduler)
    builder = PlanBuilder(grid, scheduler.config.prediction_type, name="search")
    padded = [*ratios, *[1.0] * (grid.steps - len(ratios))]
    return scheduler.write_compensated(builder, scheduler._chosen, padded, stop=node)


def search_ratios_over(
    scheduler: DCSolverScheduler,
    networks: Mapping[float, Network],
    noise: torch.Tensor,
    *,
    steps: Sequence[int],
    mu: float | None = None,
    method: SearchMethod = "forward",
) -> dict[tuple[int, float], list[float]]:
    """Ratios of runs of several lengths at several guidance scales, for ``CascadeRegression.fit``.

    A fine trajectory of 200 steps serves all runs of a guidance scale that begin at the same level.

    Args:
        scheduler: the options of all runs; its own ratios are ignored.
        networks: the model at every guidance scale.
        noise: as for ``search_ratios``.
        steps: numbers of steps.
        mu: as for ``set_timesteps``.
        method: as for ``search_ratios``.

    Returns:
        the ratios by number of steps and guidance scale.

    Raises:
        ValueError: as for ``search_ratios``.
    """
    runner: DCSolverScheduler = DCSolverScheduler.from_config(scheduler.config, ratios=None, regression=None)
    found = {}
    for scale, network in networks.items():
        truths: dict[float, Trajectory] = {}
        for count in steps:
            runner.set_timesteps(count, mu=mu)
            first = float(grid_of(runner).levels[0])
            if first not in truths:
                truths[first] = fine_trajectory(runner, network, noise, steps=max(200, *steps))
            found[count, scale] = search_ratios(runner, network, noise, truth=truths[first], method=method).ratios
    return found
