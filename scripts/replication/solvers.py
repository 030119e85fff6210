"""Claims on solvers: DPM-Solver++, DEIS, UniPC, and momentum."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from fewstep.samplers import SAMPLERS, PlanScheduler

from ..bench.tuned import Digits, Mixture, Subject
from ..bench.variants import Variants
from ..generation.pictures import labelled_grid
from ..tuning.task import change, ends, errors, followed
from .claims import Claim, Finding, Measurement, Scale, digit_grid, percent

_HELD_OUT = 10_000


class Errors:
    """Distances to where the exact flow takes noises, for samplers with trailing times.

    Args:
        subject: the model with its guidance.
        count: noises.
    """

    def __init__(self, subject: Subject, count: int) -> None:
        self.subject = subject
        inputs = subject.inputs(range(_HELD_OUT, _HELD_OUT + count))
        self._batches = followed(self._build("ddim", 3), inputs)

    def change(self, base: str, sampler: str, steps: int) -> tuple[float, float, float]:
        """Relative change of the median error against a base, in percent with its 95 % interval."""
        old, new = (
            torch.cat([errors(self._build(name, steps), batch, steps) for batch in self._batches])
            for name in (base, sampler)
        )
        figures = change(old, new, "median")
        low, high = figures["change_interval"]
        return 100.0 * figures["change"], 100.0 * low, 100.0 * high

    def _build(self, name: str, steps: int) -> PlanScheduler:
        scheduler: PlanScheduler = SAMPLERS[name].build(self.subject.config, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        return scheduler


@functools.cache
def error_of(model: str, guidance_scale: float, count: int) -> Errors:
    """Errors of a bundled model, or of ``mixture``; made once."""
    subject = Mixture(guidance_scale) if model == "mixture" else Digits(model, guidance_scale)
    return Errors(subject, count)


def _errors(
    scale: Scale, base: str, sampler: str, guidance: Sequence[float], calls: Sequence[int], bound: float = 0.0
) -> list[Finding]:
    findings = []
    for model in ("mixture", scale.model):
        for weight in guidance:
            on = error_of(model, weight, scale.noises)
            for steps in calls:
                setting = f"{model}, guidance {weight:g}, {steps} calls"
                findings.append(Finding(setting, *on.change(base, sampler, steps), bound))
    return findings


def _dpm(scale: Scale) -> Measurement:
    findings = _errors(scale, "ddim", "dpm++", (7.5,), (10, 15) if scale.quick else (10, 15, 20))
    digits = Digits(scale.model, 7.5)
    inputs = digits.inputs(range(10))
    shown = {"DDIM, 10 calls": ("ddim", 10), "DPM-Solver++, 10 calls": ("dpm++", 10), "100 calls": ("dpm++", 100)}
    rows = []
    for name, steps in shown.values():
        scheduler = SAMPLERS[name].build(digits.config, timestep_spacing="trailing")
        rows.append([digit_grid(digits.images(torch.cat([ends(scheduler, one, steps) for one in inputs])), 10)])
    return Measurement(findings, pictures={"Guidance 7.5": labelled_grid(rows, list(shown), [""])})


def _noise_form(scale: Scale) -> Measurement:
    findings = [
        Finding(one.setting, one.value, one.low, one.high, 0.0, "at least")
        for one in _errors(scale, "ddim", "dpm3m", (7.5,), (10,))
    ]
    return Measurement(findings)


def _deis(scale: Scale) -> Measurement:
    return Measurement(_errors(scale, "ddim", "deis-tab3", (1.0,), (10,)))


def _unipc(scale: Scale) -> Measurement:
    return Measurement(_errors(scale, "dpm++", "unipc", (1.0,), (5, 6, 8)))


_MOMENTUM = {
    "ipndm": ("hb-ipndm", "ghvb3.5", "ghvb2.8"),
    "dpm++": ("hb-dpm++",),
    "unipc": ("hb-unipc",),
}


def _momentum(scale: Scale) -> Measurement:
    bench = Variants(scale.model, 8, scale.images // 2)
    findings = []
    for weight in (7.5,) if scale.quick else (7.5, 15.0):
        for base, samplers in _MOMENTUM.items():
            plain = bench.measure(base, weight)
            for name in samplers:
                point = bench.measure(name, weight)
                setting = f"{scale.model}, guidance {weight:g}, 8 calls, {name} against {base}"
                findings.append(Finding(f"{setting}: magnitude score", *percent(plain.magnitude, point.magnitude)))
                findings.append(Finding(f"{setting}: Frechet distance", *percent(plain.frechet, point.frechet)))
    return Measurement(findings)


CLAIMS = (
    Claim(
        "dpm-solver++",
        "2211.01095",
        "DPM-Solver++",
        "Under strong guidance DPM-Solver++(2M) is closer to the exact flow than DDIM, at 10 calls and above.",
        "fewstep bench accuracy",
        _dpm,
    ),
    Claim(
        "noise-form",
        "2211.01095",
        "DPM-Solver of order 3",
        "Under strong guidance at 10 calls the noise form of high order is worse than DDIM.",
        "fewstep bench accuracy",
        _noise_form,
        "The paper saw it on pixels of 256 x 256; small latents and the mixture do not diverge so early.",
    ),
    Claim(
        "deis",
        "2204.13902",
        "DEIS",
        "At 10 calls tAB3 is closer to the exact flow than DDIM.",
        "fewstep bench accuracy",
        _deis,
    ),
    Claim(
        "unipc",
        "2302.04867",
        "UniPC",
        "Below 10 calls UniPC is closer to the exact flow than DPM-Solver++.",
        "fewstep bench accuracy",
        _unipc,
    ),
    Claim(
        "momentum",
        "2307.11118",
        "HB and GHVB",
        "At 8 calls and a guidance of 7.5 and above, momentum lowers the magnitude score and the Frechet distance.",
        "fewstep bench variants",
        _momentum,
        "Momentum pays where the solver without it diverges, as PLMS of order 4 does; of order 2 none does here.",
    ),
)
