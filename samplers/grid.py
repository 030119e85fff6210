"""The times of one run: N noise levels at which the network is called, and the level where the run ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .options import RESPACINGS
from .schedule import Array, DiscreteVPSchedule, EDMSchedule, FlowSchedule, NoiseSchedule
from .weights import Node

FLOW_START = 1.0 - 1e-6
"""First level of diffusers' UniPC flow grid: just below 1, so that alpha is not 0."""


@dataclass(frozen=True)
class Grid:
    """N + 1 strictly decreasing noise levels with their time labels.

    Attributes:
        schedule: where the levels live.
        levels: ``(N + 1,)`` in diffusers' ``sigmas`` units; the last one is where the run ends.
        timesteps: ``(N,)`` labels for the network.
        nodes: ``alpha`` and ``sigma`` of every level.
    """

    schedule: NoiseSchedule
    levels: Array
    timesteps: Array
    nodes: tuple[Node, ...]

    @staticmethod
    def of(schedule: NoiseSchedule, levels: Sequence[float] | Array, timesteps: Sequence[float] | Array) -> Grid:
        """Checks and completes a grid.

        Raises:
            ValueError: levels that are not finite, not decreasing, outside the schedule, or too few.
        """
        points, labels = np.asarray(levels, np.float64), np.asarray(timesteps, np.float64)
        if len(points) < 2 or len(labels) != len(points) - 1:
            raise ValueError(f"a grid needs N >= 1 timesteps and N + 1 levels, got {len(labels)} and {len(points)}")
        if not np.isfinite(points).all() or (points < 0).any():
            raise ValueError(f"sigmas must be finite and not negative, got {points.tolist()}")
        if schedule.kind == "flow" and points[0] > 1.0:
            raise ValueError(f"sigmas of a flow model lie in [0, 1], got {points[0]}")
        if not (np.diff(points) < 0).all():
            k = int(np.argmax(np.diff(points) >= 0))
            raise ValueError(
                f"sigmas must decrease strictly, but number {k} is {points[k]:.6g} and the next {points[k + 1]:.6g}; "
                "use fewer steps, another spacing, or fractional_timesteps=True"
            )
        alpha, sigma = schedule.alpha_sigma(points)
        nodes = tuple(Node(float(a), float(s)) for a, s in zip(alpha, sigma, strict=True))
        return Grid(schedule, points, labels, nodes)

    @property
    def steps(self) -> int:
        """Number of intervals."""
        return len(self.timesteps)


def make_grid(
    schedule: NoiseSchedule,
    config: Mapping[str, Any],
    num_inference_steps: int | None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Grid:
    """The grid that a scheduler's config and the arguments of ``set_timesteps`` describe.

    Args:
        schedule: made from the same config.
        config: keys of ``ScheduleConfig`` and ``flow_grid``.
        num_inference_steps: number of intervals, where neither timesteps nor sigmas are given.
        timesteps: custom labels, decreasing; kept exactly.
        sigmas: custom levels, decreasing, with or without the terminal one. On flow schedules they are shifted
            like the default ones, as in diffusers.
        mu: the logarithm (``time_shift_type="exponential"``) or value (``"linear"``) of the dynamic shift.

    Raises:
        ValueError: contradicting or impossible arguments.
    """
    if timesteps is None and sigmas is None and num_inference_steps is None:
        raise ValueError("pass num_inference_steps, timesteps or sigmas")
    if num_inference_steps is not None and num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    custom = timesteps is not None or sigmas is not None
    chosen = [name for name in RESPACINGS if config[name]]
    if timesteps is not None and chosen:
        raise ValueError(f"timesteps cannot be combined with {chosen[0]}=True; drop one of the two")
    shift = _shift(config, mu)
    terminal = _terminal(schedule, config, shift)
    labels: Array | None = None
    if custom:
        levels, labels, ended = _custom(schedule, timesteps, sigmas, terminal, shift)
        if chosen and isinstance(schedule, FlowSchedule):
            # Flux and relatives hand over sigmas always; the re-spacing keeps their ends and their number.
            inner = levels[: len(levels) - ended]
            inner = _respace(chosen[0], float(inner[0]), float(inner[-1]), len(inner))
            levels, labels = np.append(inner, levels[len(inner) :]), None
    else:
        assert num_inference_steps is not None
        ended = False
        if chosen or isinstance(schedule, EDMSchedule):
            levels = _respaced(schedule, config, chosen, num_inference_steps, terminal, shift)
            ended = len(levels) == num_inference_steps + 1
        elif isinstance(schedule, FlowSchedule):
            levels = _flow(schedule, config, num_inference_steps, shift)
        else:
            labels = _spaced_labels(schedule, config, num_inference_steps)
            levels = schedule.level(labels)
    if not ended:
        if timesteps is not None and levels[-1] <= terminal:
            raise ValueError(
                f"timesteps end with {float(timesteps[-1]):g}, where a run to sigma_min ends; "
                "leave that one out, or use final_sigmas_type='zero'"
            )
        levels = np.append(levels, terminal)
    if config.get("denoise_to_zero"):
        levels = np.append(levels, 0.0)
        if labels is not None and len(labels) < len(levels) - 1:
            labels = np.append(labels, schedule.timestep(levels[-2]))
    # float32 like the table that pipelines read, so that both mean the same numbers.
    levels = levels.astype(np.float32).astype(np.float64)
    if labels is None:
        labels = schedule.timestep(levels[:-1])
        if isinstance(schedule, DiscreteVPSchedule) and not config.get("fractional_timesteps"):
            # diffusers rounds the labels of Karras and uniform-lambda grids and truncates the others.
            truncated = bool(chosen) and chosen[0] in ("use_exponential_sigmas", "use_beta_sigmas")
            labels = np.floor(labels) if truncated else np.round(labels)
    return Grid.of(schedule, levels, labels)


def _custom(
    schedule: NoiseSchedule,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    terminal: float,
    shift: Any,
) -> tuple[Array, Array | None, bool]:
    """Levels, labels and whether the levels hold the terminal one."""
    if sigmas is None:
        labels = np.asarray(timesteps, np.float64)
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"timesteps must be a list of at least one number, got shape {labels.shape}")
        first = schedule.num_train_timesteps - (0 if schedule.kind == "flow" else 1)
        if not np.isfinite(labels).all():
            raise ValueError(f"timesteps must be finite, got {labels.tolist()}")
        if schedule.kind != "edm" and (labels.max() > first or labels.min() < 0):
            raise ValueError(f"timesteps must lie in [0, {first}], got {labels.tolist()}")
        return schedule.level(labels), labels, False
    levels = np.asarray(sigmas, np.float64)
    if levels.ndim != 1 or len(levels) == 0:
        raise ValueError(f"sigmas must be a list of at least one number, got shape {levels.shape}")
    ended = len(levels) > 1 and (levels[-1] == 0.0 or bool(np.isclose(levels[-1], terminal, rtol=1e-6)))
    if schedule.kind == "flow" and levels.max() > 1.0:
        raise ValueError(f"sigmas of a flow model lie in [0, 1], got {levels.max():g}")
    levels = shift(levels)
    labels_given = None
    if timesteps is not None:
        labels_given = np.asarray(timesteps, np.float64)[: len(levels) - ended]
        if len(labels_given) != len(levels) - ended:
            raise ValueError(
                f"timesteps has {len(labels_given)} entries and sigmas {len(levels) - ended}; make them equal"
            )
    return levels, labels_given, ended


def _spaced_labels(schedule: NoiseSchedule, config: Mapping[str, Any], steps: int) -> Array:
    """Labels by ``timestep_spacing``, table 2 of arXiv 2305.08891, with diffusers' N + 1 points down to 0."""
    spacing, total = config["timestep_spacing"], schedule.num_train_timesteps
    last = total - _clipped(schedule, config)
    fractional = bool(config.get("fractional_timesteps"))
    if spacing == "linspace":
        if not fractional and steps >= last:
            raise ValueError(
                f"num_inference_steps {steps} is too many for timestep_spacing 'linspace' with {last} timesteps; "
                "use fewer steps"
            )
        labels = np.linspace(0, last - 1, steps + 1)[:0:-1]
        return labels if fractional else labels.round()
    if spacing == "leading":
        ratio = last / (steps + 1) if fractional else last // (steps + 1)
        if ratio < 1:
            raise ValueError(
                f"num_inference_steps {steps} is too many for timestep_spacing 'leading' with {last} timesteps; "
                "use fewer steps or timestep_spacing='trailing'"
            )
        labels = np.arange(steps, 0, -1) * ratio + config["steps_offset"]
        if labels[0] > total - 1:
            raise ValueError(f"steps_offset {config['steps_offset']} moves the first timestep past {total - 1}")
        return labels
    if spacing == "trailing":
        if not fractional and steps > last:
            raise ValueError(f"num_inference_steps {steps} exceeds the {last} timesteps of the schedule")
        # Multiples by integers: a float arange gains an entry of -1 for some step numbers. Clipped schedules keep
        # the width of the whole one, as in diffusers, unless it leaves too few steps.
        width = total if last * steps > total * (steps - 1) else last
        labels = last - np.arange(steps) * width / steps
        return (labels if fractional else labels.round()) - 1
    raise ValueError(f"timestep_spacing {spacing!r} is unknown; use linspace, leading or trailing")


def _clipped(schedule: NoiseSchedule, config: Mapping[str, Any]) -> int:
    """Number of timesteps noisier than ``lambda_min_clipped``."""
    bound = config["lambda_min_clipped"]
    if bound is None or bound == -math.inf:
        return 0
    levels = schedule.level(np.arange(schedule.num_train_timesteps))
    clipped = int((-np.log(levels) < bound).sum())
    if clipped >= schedule.num_train_timesteps - 1:
        raise ValueError(f"lambda_min_clipped {bound} leaves no timesteps; lower it")
    return clipped


def _flow(schedule: FlowSchedule, config: Mapping[str, Any], steps: int, shift: Any) -> Array:
    total = schedule.num_train_timesteps
    if config["flow_grid"] == "from_one":
        levels = shift(np.linspace(1.0, 1.0 / total, steps + 1)[:-1])
        if config["shift_terminal"]:
            levels = _stretch(levels, config["shift_terminal"])
        levels[0] = min(levels[0], FLOW_START)
        return levels
    levels = shift(np.linspace(0.0, 1.0 - 1.0 / total, steps + 1))[:0:-1].copy()
    return _stretch(levels, config["shift_terminal"]) if config["shift_terminal"] else levels


def _stretch(levels: Array, terminal: float) -> Array:
    """Moves the last level before the end to ``terminal``, keeping 1 (LTX-Video)."""
    if not 0.0 < terminal < 1.0:
        raise ValueError(f"shift_terminal {terminal} must lie between 0 and 1, or be None")
    if len(levels) == 1:
        # The one step starts at the noise, so there is no other level to move.
        return levels
    distance = 1.0 - levels
    return 1.0 - distance * ((1.0 - terminal) / distance[-1])


def _respaced(
    schedule: NoiseSchedule, config: Mapping[str, Any], chosen: list[str], steps: int, terminal: float, shift: Any
) -> Array:
    """A re-spacing between the ends of the schedule; N + 1 points where it ends at the terminal level itself."""
    low, high = schedule.min_level, schedule.max_level
    mapped = False
    if isinstance(schedule, FlowSchedule):
        total = schedule.num_train_timesteps
        low, high = float(shift(np.asarray(1.0 / total))), float(shift(np.asarray(1.0 - 1.0 / total)))
        # sigma_min and sigma_max of a flow model are given in units of sigma / alpha (diffusers' UniPC).
        mapped = config["sigma_min"] is not None or config["sigma_max"] is not None
        if mapped:
            low, high = low / (1.0 - low), high / (1.0 - high)
    low = low if config["sigma_min"] is None else config["sigma_min"]
    high = high if config["sigma_max"] is None else config["sigma_max"]
    if mapped and config["final_sigmas_type"] == "sigma_min":
        terminal = low
    if not 0.0 < low < high:
        raise ValueError(f"sigma_min {low} and sigma_max {high} must satisfy 0 < sigma_min < sigma_max")
    if not config["rho"] > 0:
        raise ValueError(f"rho {config['rho']} must be positive; 7 is usual")
    name = chosen[0] if chosen else f"use_{config['sigma_schedule']}_sigmas"
    # Ending where the respacing ends: the terminal level is its last point, or the last step has no length.
    points = steps + 1 if np.isclose(low, terminal, rtol=1e-5) else steps
    if name == "use_lu_lambdas" and isinstance(schedule, DiscreteVPSchedule) and config["sigma_min"] is None:
        levels = np.exp(np.linspace(schedule.log_max_level, schedule.log_min_level, points))
    else:
        levels = _respace(name, high, low, points, config["rho"], lu_flow=schedule.kind == "flow" and not mapped)
    return levels / (1.0 + levels) if mapped else levels


def _respace(name: str, high: float, low: float, points: int, rho: float = 7.0, lu_flow: bool = True) -> Array:
    ramp = np.linspace(0.0, 1.0, points) if points > 1 else np.zeros(1)
    if name == "use_karras_sigmas":
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if name == "use_beta_sigmas":
        from scipy.special import betaincinv

        return low + (high - low) * betaincinv(0.6, 0.6, 1.0 - ramp)
    if name == "use_lu_lambdas" and lu_flow:
        high, low = min(high, FLOW_START), min(low, FLOW_START)
        first, last = math.log((1 - high) / high), math.log((1 - low) / low)
        return 1.0 / (1.0 + np.exp(first + ramp * (last - first)))
    if name in ("use_exponential_sigmas", "use_lu_lambdas"):
        return np.exp(np.linspace(math.log(high), math.log(low), points)) if points > 1 else np.array([high])
    raise ValueError(f"spacing {name!r} is unknown")


def _terminal(schedule: NoiseSchedule, config: Mapping[str, Any], shift: Any) -> float:
    kind = config["final_sigmas_type"]
    if kind == "zero":
        return 0.0
    if kind != "sigma_min":
        raise ValueError(f"final_sigmas_type {kind!r} is unknown; use zero or sigma_min")
    return float(shift(np.asarray(schedule.min_level)))


def _shift(config: Mapping[str, Any], mu: float | None) -> Any:
    """The function that shifts flow levels (arXiv 2403.03206, equation 23); the identity elsewhere."""
    if not config["use_flow_sigmas"]:
        return lambda s: s
    factor = config["flow_shift"]
    if config["use_dynamic_shifting"]:
        if mu is None:
            raise ValueError("mu is needed with use_dynamic_shifting=True; pass mu to set_timesteps")
        if config["time_shift_type"] not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type {config['time_shift_type']!r} is unknown; use exponential or linear")
        try:
            factor = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
        except OverflowError:
            raise ValueError(f"mu {mu} is too large: the shift is its exponential; 0.5 to 3 is usual") from None
    if not 0 < factor < math.inf:
        raise ValueError(f"the shift of the timesteps must be positive and finite, got {factor}")
    return lambda s: factor * s / (1.0 + (factor - 1.0) * s)
