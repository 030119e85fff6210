"""What a sampler is fitted to, and on what the result is measured: noises, and where the exact flow takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fewstep.samplers import Denoiser, PlanScheduler, Trajectory, fine_trajectory
from fewstep.samplers.trajectory import Network

from ..generation.model import Model

FINE = 200
"""Steps of the runs that count as exact."""
_AT_ONCE = 50
"""Noises that the network sees at a time."""


class Inputs(NamedTuple):
    """Noises with their conditions.

    Attributes:
        network: the model with these conditions and with guidance.
        noise: standard normal, one a condition.
    """

    network: Network
    noise: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Noises with their conditions, and where the exact flow takes them.

    Attributes:
        network: the model with these conditions and with guidance.
        noise: standard normal, one a condition.
        truth: the exact flow from there.
    """

    network: Network
    noise: torch.Tensor
    truth: Trajectory


class Conditions:
    """Denoisers of a model for as many samples as wanted: its classes, or the prompts, in turn.

    Args:
        model: what is sampled.
        prompts: of a text model.
        guidance_scale: 1 is none.

    Raises:
        ValueError: prompts for a model that takes none, or none for one that does.
    """

    def __init__(self, model: Model, prompts: Sequence[str], guidance_scale: float) -> None:
        if (model.kind == "text") != bool(prompts):
            raise ValueError(
                f"--prompt: model {model.name!r} needs at least one, of the kind that it will be used for"
                if model.kind == "text"
                else f"--prompt {prompts[0]!r}: model {model.name!r} takes none; leave it out"
            )
        if model.kind == "unconditional" and guidance_scale != 1.0:
            raise ValueError(f"--guidance-scale {guidance_scale:g}: model {model.name!r} has no guidance; leave it out")
        self.model, self.prompts, self.guidance_scale = model, list(prompts), guidance_scale

    def batches(self, scheduler: PlanScheduler, seeds: range) -> list[Batch]:
        """Noises and where the exact flow takes them.

        Args:
            scheduler: with its timesteps set.
            seeds: of the noises; number ``k`` has the ``k``-th condition in turn.
        """
        return followed(scheduler, self.inputs(seeds))

    def inputs(self, seeds: range) -> list[Inputs]:
        """Noises, one a seed whatever the batches, with the model under their conditions."""
        found = []
        for begin in range(0, len(seeds), _AT_ONCE):
            part = seeds[begin : begin + _AT_ONCE]
            network = self.denoiser(part)
            noise = noises(part, network.shape, torch.float32).to(self.model.pipeline.device)
            found.append(Inputs(network, noise))
        return found

    def denoiser(self, seeds: range) -> Denoiser:
        """The model with the conditions of these seeds."""
        inputs: dict[str, Any] = {}
        count = 1
        if self.model.kind == "class":
            inputs["class_labels"] = [self.model.classes[k % len(self.model.classes)] for k in seeds]
        elif self.model.kind == "text":
            inputs["prompt"] = [self.prompts[k % len(self.prompts)] for k in seeds]
        else:
            count = len(seeds)
        if "guidance_scale" in self.model.parameters:
            inputs["guidance_scale"] = self.guidance_scale
        return Denoiser.from_pipeline(self.model.pipeline, num_images_per_prompt=count, **inputs)


def noises(seeds: range, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Standard normal, one generator a sample."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(k), dtype=dtype) for k in seeds])


def followed(scheduler: PlanScheduler, inputs: Sequence[Inputs]) -> list[Batch]:
    """The exact flow from noises, through the scheduler's times."""
    steps = max(FINE, scheduler_steps(scheduler))
    return [Batch(*one, fine_trajectory(scheduler, *one, steps=steps)) for one in inputs]


def scheduler_steps(scheduler: PlanScheduler) -> int:
    """Steps that its timesteps were set for."""
    steps = scheduler.num_inference_steps
    assert steps is not None
    return steps


def compare(before: Any, after: Any, batches: Sequence[Batch], steps: int) -> dict[str, Any]:
    """Errors of two schedulers on the same noises, a root mean square over each sample; their mean and median.

    Args:
        before: what the sampler was.
        after: what it became.
        batches: of noises.
        steps: of both.
    """
    old, new = (torch.cat([errors(s, batch, steps) for batch in batches]) for s in (before, after))
    return {"samples": len(old), **{name: change(old, new, name) for name in STATISTICS}}


STATISTICS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda e: e.mean(-1),
    "median": lambda e: e.median(-1).values,
    "root_mean_square": lambda e: e.square().mean(-1).sqrt(),
}
"""Of errors over samples: on data with modes the mean is ruled by the few samples that end in another one."""


def change(old: torch.Tensor, new: torch.Tensor, name: str) -> dict[str, Any]:
    """A statistic before and after, and its relative change with a 95 % interval from 2000 resamplings in pairs."""
    statistic = STATISTICS[name]
    draws = torch.randint(len(old), (2000, len(old)), generator=torch.Generator().manual_seed(0))
    ratios = statistic(new[draws]) / statistic(old[draws]) - 1.0
    return {
        "before": float(statistic(old)),
        "after": float(statistic(new)),
        "change": float(statistic(new) / statistic(old) - 1.0),
        "change_interval": [float(ratios.quantile(q)) for q in (0.025, 0.975)],
    }


@torch.no_grad()
def errors(scheduler: Any, batch: Batch, steps: int) -> torch.Tensor:
    """Each sample's root mean square distance to the exact end, ``(B,)``."""
    end = ends(scheduler, Inputs(batch.network, batch.noise), steps)
    return (end - batch.truth.samples[-1]).flatten(1).double().square().mean(1).sqrt().cpu()


@torch.no_grad()
def ends(scheduler: Any, inputs: Inputs, steps: int) -> torch.Tensor:
    """Where a scheduler, of ours or of diffusers, takes the noises."""
    scheduler.set_timesteps(steps)
    sample = inputs.noise * scheduler.init_noise_sigma
    for label in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, label)
        sample = scheduler.step(inputs.network(scaled, label), label, sample, return_dict=False)[0]
    return sample
