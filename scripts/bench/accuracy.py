"""Error against network calls, on a mixture of Gaussians in 64 dimensions whose trajectories are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from fewstep.metrics import GaussianMixture, GuidedPair
from fewstep.samplers import SAMPLERS

from ..plots import save_figure
from .output import STABLE_DIFFUSION, table

CALLS = (5, 6, 7, 8, 10, 12, 15, 20, 25, 30)
GUIDANCE = (1.0, 7.5)
NOISES = 64
MIXTURE = 10
"""Seed of the mixture: not one that the presets were chosen on."""
SAMPLER_NAMES = ("dpm++", "deis", "unipc")

THEIRS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# Colours that stay apart with any colour vision (Okabe and Ito).
_STYLES = {"dpm++": ("#0072B2", "o"), "deis": ("#D55E00", "s"), "unipc": ("#009E73", "^")}
VARIANTS = _DEFAULT, _ACCURATE, _DIFFUSERS = "fewstep", 'fewstep, preset="accurate"', "diffusers"
# Where ours and diffusers' agree, the dashes lie on a pale band.
_LINES: Mapping[str, Callable[[str], dict[str, Any]]] = {
    _DEFAULT: lambda marker: {"linewidth": 5, "alpha": 0.35},
    _ACCURATE: lambda marker: {"linewidth": 2, "marker": marker},
    _DIFFUSERS: lambda marker: {"linewidth": 1.2, "linestyle": "--", "marker": marker, "markerfacecolor": "white"},
}


@dataclass(frozen=True)
class Curve:
    """The error of one solver over the number of network calls.

    Attributes:
        sampler: ``dpm++``, ``deis`` or ``unipc``.
        variant: whose solver, and with which options.
        guidance: scale of classifier-free guidance; 1 is none.
        errors: ``(network calls, root mean square error)``.
    """

    sampler: str
    variant: str
    guidance: float
    errors: tuple[tuple[int, float], ...]


class Reference:
    """A model, its initial noises, and where the exact probability flow takes them.

    Args:
        guidance: scale between one component of the mixture, as the class, and the whole of it.
        noises: number of initial noises.
    """

    def __init__(self, guidance: float, noises: int = NOISES) -> None:
        mixture = GaussianMixture.random(seed=MIXTURE)
        self.guidance = guidance
        self.model = mixture if guidance == 1.0 else GuidedPair(mixture.component(0), mixture, guidance)
        self.noise = torch.randn(noises, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        theirs = diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION)
        abar = float(theirs.alphas_cumprod[-1])
        pair = self.model if isinstance(self.model, GuidedPair) else None
        self.exact = mixture.solve(self.noise, (abar**0.5, (1.0 - abar) ** 0.5), (1.0, 0.0), guidance=pair)

    def error(self, scheduler: Any, steps: int) -> tuple[int, float]:
        """Network calls and root mean square error of a run, which begins with the same noise whatever the solver.

        Args:
            scheduler: ours or diffusers', of a model that predicts epsilon.
            steps: of ``set_timesteps``.
        """
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)
        sample = self.noise
        levels = scheduler.sigmas.double().tolist()
        for label, level in zip(scheduler.timesteps, levels, strict=False):
            alpha = (1.0 + level * level) ** -0.5
            clean = self.model.clean(sample, alpha, level * alpha)
            output = (sample - alpha * clean) / (level * alpha)
            sample = scheduler.step(output, label, sample, return_dict=False)[0].double()
        return len(scheduler.timesteps), float((sample - self.exact).square().mean().sqrt())


def accuracy_curves(
    calls: Sequence[int] = CALLS, guidance: Sequence[float] = GUIDANCE, noises: int = NOISES
) -> Iterator[Curve]:
    """Ours at their defaults and with the preset, and diffusers' same classes at their defaults.

    The noise schedule is Stable Diffusion's. A preset may be measured for other models than this one; it is asked for
    the guidance scale of the measurement.

    Args:
        calls: numbers of steps; all these solvers take one network call a step.
        guidance: scales.
        noises: initial noises.
    """
    for scale in guidance:
        reference = Reference(scale, noises)
        for name in SAMPLER_NAMES:
            sampler = SAMPLERS[name]
            variants: Mapping[str, Any] = {
                _DEFAULT: sampler.build(STABLE_DIFFUSION),
                _ACCURATE: sampler.build(STABLE_DIFFUSION, preset="accurate", guidance_scale=scale),
                _DIFFUSERS: getattr(diffusers, THEIRS[name])(**STABLE_DIFFUSION),
            }
            for variant, scheduler in variants.items():
                yield Curve(name, variant, scale, tuple(reference.error(scheduler, n) for n in calls))


def accuracy_table(curves: Sequence[Curve]) -> str:
    """The curves as text, a line a solver, a block a guidance scale."""
    blocks = []
    for scale in dict.fromkeys(curve.guidance for curve in curves):
        chosen = [curve for curve in curves if curve.guidance == scale]
        header = [_title(scale), "", *(str(n) for n, _ in chosen[0].errors)]
        rows = [[c.sampler, c.variant, *(f"{error:.2g}" for _, error in c.errors)] for c in chosen]
        blocks.append(table(header, rows))
    return "\n\n".join(blocks)


def plot_accuracy(curves: Sequence[Curve], path: Path) -> None:
    """Draws error over network calls, a panel a guidance scale, ours solid and diffusers dashed.

    Args:
        curves: of ``accuracy_curves``.
        path: of the picture, ending in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    scales = list(dict.fromkeys(curve.guidance for curve in curves))
    figure = Figure(figsize=(5.2 * len(scales), 4.6), layout="constrained")
    panels = figure.subplots(1, len(scales), squeeze=False)[0]
    for panel, scale in zip(panels, scales, strict=True):
        for curve in (c for c in curves if c.guidance == scale):
            colour, marker = _STYLES[curve.sampler]
            label = f"{curve.sampler}, {curve.variant}"
            panel.plot(*zip(*curve.errors, strict=True), color=colour, label=label, **_LINES[curve.variant](marker))
        panel.set(
            title=_title(scale), xscale="log", yscale="log", xlabel="network calls", ylabel="RMSE to the exact ODE"
        )
        ticks = sorted({n for curve in curves for n, _ in curve.errors})
        panel.set_xticks(ticks, [str(n) for n in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(which="major", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def _title(scale: float) -> str:
    return "no guidance" if scale == 1.0 else f"guidance {scale:g}"
