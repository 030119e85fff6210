"""Claims on samplers that are fitted to a model: DC-Solver, S^3, and learned plans."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from fewstep.samplers import SAMPLERS

from ..bench.tuned import Comparison, Digits, Mixture, Size, Subject
from ..tuning.task import change
from .claims import Claim, Finding, Measurement, Scale


@functools.cache
def _comparison(scale: Scale, guidance_scale: float) -> tuple[str, Comparison]:
    """A quick one is on the mixture, where a network call costs nothing; the other on digits."""
    name = "mixture" if scale.quick else scale.model
    subject: Subject = Mixture(guidance_scale) if scale.quick else Digits(name, guidance_scale)
    size = Size(held_out=50, images=100, iterations=12, rounds=1, polish=150) if scale.quick else Size(iterations=5)
    return name, Comparison(subject, guidance_scale, size, scale.folder / name)


def _finding(
    scale: Scale, guidance_scale: float, calls: int, method: str, statistic: str, bound: float, base: Any = None
) -> Finding:
    """Change of a statistic of the errors; without a base it is against the best unsearched sampler."""
    name, on = _comparison(scale, guidance_scale)
    against, old = _best_unsearched(on, calls, statistic) if base is None else base(on, calls)
    figures = change(old, on.errors(on.fitted(method, calls), calls), statistic)
    low, high = figures["change_interval"]
    setting = f"{name}, guidance {guidance_scale:g}, {calls} calls, against {against}"
    return Finding(setting, 100.0 * figures["change"], 100.0 * low, 100.0 * high, bound)


def _best_unsearched(on: Comparison, calls: int, statistic: str) -> tuple[str, torch.Tensor]:
    """Of diffusers' at their best settings and of ours as registered, on the held-out noises themselves."""
    rival = on.best(calls)
    found = {rival.name: on.errors(rival.scheduler, rival.steps)}
    for name, sampler in SAMPLERS.items():
        scheduler = sampler.build(on.subject.config, timestep_spacing="trailing")
        scheduler.set_timesteps(calls)
        if scheduler.order == 1 and not scheduler.plan.is_stochastic:
            found[name] = on.errors(scheduler, calls)
    best = min(found, key=lambda name: float(change(found[name], found[name], statistic)["after"]))
    return best, found[best]


def _unipc(on: Comparison, calls: int) -> tuple[str, torch.Tensor]:
    return "UniPC", on.errors(on.fitted("unipc", calls), calls)


def _diffusers(on: Comparison, calls: int) -> tuple[str, torch.Tensor]:
    rival = on.best(calls)
    return rival.name, on.errors(rival.scheduler, rival.steps)


def _scales(scale: Scale) -> Sequence[float]:
    return (1.0,) if scale.quick else (1.0, 4.0)


def _dc(scale: Scale) -> Measurement:
    return Measurement([_finding(scale, w, 5, "dc", "mean", -15.0, _unipc) for w in _scales(scale)])


def _searched(scale: Scale) -> Measurement:
    calls = (5,) if scale.quick else (5, 10)
    return Measurement([_finding(scale, w, n, "s3", "mean", -25.0) for w in _scales(scale) for n in calls])


def _learned(scale: Scale) -> Measurement:
    calls = (5,) if scale.quick else (4, 5, 6, 8, 10)
    return Measurement(
        [_finding(scale, w, n, "learned", "median", -50.0, _diffusers) for w in _scales(scale) for n in calls]
    )


_COMMAND = "fewstep bench tuned --folder fits --iterations 5"
CLAIMS = (
    Claim(
        "dc-solver",
        "2409.03755",
        "DC-Solver",
        "At 5 calls at least 15 % less mean error than UniPC.",
        _COMMAND,
        _dc,
        "Under guidance the ratios are scalars for errors that differ from sample to sample.",
    ),
    Claim(
        "s3",
        "2312.07243",
        "USF and S^3",
        "A searched schedule has at least 25 % less mean error than the best unsearched sampler, at 5 and 10 calls.",
        _COMMAND,
        _searched,
        "Where it falls short, the search would need more evaluations than it has.",
    ),
    Claim(
        "learned",
        "",
        "learned plans",
        "At most half the median error of the best of diffusers at as many calls.",
        _COMMAND,
        _learned,
    ),
)
