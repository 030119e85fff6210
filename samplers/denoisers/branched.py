"""Denoisers of the pipelines that are taken apart: the network with its conditions, the branches of guidance apart."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from .call import (
    BlankNetwork,
    Generators,
    OneTimestep,
    PipelineCall,
    SchedulerStandIn,
    check_inputs,
    private_generator,
)
from .denoiser import Branches, Denoiser, Start, check_samples, time_label
from .families import FAMILIES, ROWS, Branch, ask_for, conditions_of, joined, map_rows, owner_of_call


class BranchedDenoiser(Denoiser):
    """The denoiser of a pipeline of Stable Diffusion 1 or 2, SDXL, SD3, Flux, DiT or DDPM.

    Conditions and first latents are what the pipeline's own call makes of its inputs; the network is called as the
    pipeline calls it, the branches of guidance as one batch, or one after the other where the pipeline does so (Flux).
    A batch may have any number of samples for each prompt, not only ``num_images_per_prompt``.

    Args:
        pipeline: one of these; subclasses with the same call too.
        num_images_per_prompt: samples of each prompt or class label, neighbours in the batch.
        inputs: arguments of the pipeline's call.

    Attributes:
        guidance_scale: of classifier-free guidance; may be set where there are two branches.
        guidance_rescale: as in arXiv 2305.08891, section 3.4.

    Raises:
        ValueError: another pipeline, or inputs that it refuses or that are not a part of the network's conditions.
    """

    def __init__(self, pipeline: Any, *, num_images_per_prompt: int = 1, **inputs: Any) -> None:
        check_inputs(pipeline, inputs, num_images_per_prompt)
        if not self.takes(pipeline, inputs):
            given = [name for name in inputs if any(name in family.whole for family in FAMILIES.values())]
            subject = f"a {type(pipeline).__name__}" + (f" with {', '.join(given)}" if given else "")
            raise ValueError(f"{subject} cannot be taken apart; use DrivenDenoiser or Denoiser.from_pipeline")
        owner = owner_of_call(type(pipeline))
        family = self._family = FAMILIES[owner.__name__]
        prompts = ask_for(pipeline, family, inputs, num_images_per_prompt)
        self._call = PipelineCall(pipeline, inputs)
        self._network = getattr(pipeline, family.network)
        self.scheduler_config = pipeline.scheduler.config
        parameters = self._call.parameters
        self.guidance_scale, self.guidance_rescale = (
            float(inputs.get(name, parameters[name].default)) if name in parameters else default
            for name, default in ((family.scale, 1.0), ("guidance_rescale", 0.0))
        )
        self._rescaled: Callable[..., torch.Tensor] | None = getattr(
            sys.modules[owner.__module__], "rescale_noise_cfg", None
        )
        blank = BlankNetwork(self._network)
        self._batch_size = 0 if prompts is None else prompts * num_images_per_prompt
        latents = self._start(OneTimestep(self.scheduler_config), 1, private_generator(), blank=blank)
        self._batch_size, self._shape, self._dtype = len(latents), tuple(latents.shape[1:]), latents.dtype
        self._prompts = self._batch_size // num_images_per_prompt
        self._conditions = conditions_of(blank.noted, family, self._batch_size, self._prompts)
        self._rows: dict[tuple[Branch, ...], dict[str, Any]] = {}
        self._rows_each = 0

    @staticmethod
    def takes(pipeline: Any, inputs: Mapping[str, Any]) -> bool:
        """Whether this pipeline is taken apart, with these inputs."""
        owner = owner_of_call(type(pipeline))
        family = FAMILIES.get(owner.__name__) if owner.__module__.startswith("diffusers.") else None
        return family is not None and all(inputs.get(name) is None for name in family.whole)

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def is_guided(self) -> bool:
        """Whether there are two branches."""
        return "unconditional" in self._conditions

    # ---------------------------------------------------------------- predictions

    def __call__(self, x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        if not self.is_guided:
            return self.conditional(x, t)
        return self.guided(*self.branches(x, t))

    def conditional(self, x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        """The prediction with the prompt and without guidance; arguments and result as of a call."""
        return self._predictions(x, t, "conditional")[0]

    def unconditional(self, x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        """The prediction with the negative prompt; arguments and result as of a call.

        Raises:
            ValueError: there is no such branch.
        """
        return self._predictions(x, t, "unconditional")[0]

    def branches(self, x: torch.Tensor, t: float | torch.Tensor) -> Branches:
        conditional, unconditional = self._predictions(x, t, "conditional", "unconditional")
        return Branches(conditional, unconditional)

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        """Both branches put together as the pipeline does it."""
        prediction = unconditional + self.guidance_scale * (conditional - unconditional)
        if self._rescaled is not None and self.guidance_rescale > 0.0:
            return self._rescaled(prediction, conditional, guidance_rescale=self.guidance_rescale)
        return prediction

    def _predictions(self, x: torch.Tensor, t: float | torch.Tensor, *wanted: Branch) -> list[torch.Tensor]:
        if "unconditional" in wanted and not self.is_guided:
            raise ValueError(
                "there is no unconditional branch: the model has none, or it was asked for without guidance; give "
                f"{self._family.scale} > 1 and, with embeddings, negative ones"
            )
        self._check("x", x)
        self._count(x)
        t, seen = time_label(t, x), x.to(self._dtype)
        first = self._family.first
        if first is None or len(wanted) == 1:
            outputs = [self._output(seen, t, (branch,)) for branch in wanted]
        else:
            t = t.repeat(len(first)) if t.ndim else t
            halves = self._output(torch.cat([seen] * len(first)), t, first).chunk(len(first))
            outputs = [halves[first.index(branch)] for branch in wanted]
        return [output.to(x.dtype) for output in outputs]

    def _output(self, x: torch.Tensor, t: torch.Tensor, branches: tuple[Branch, ...]) -> torch.Tensor:
        """Of the network, for one branch or for both in one batch."""
        if self._family.label != "as it is":
            t = t.expand(len(x))
        if self._family.label == "in 0 to 1":
            t = t.to(x.dtype) / 1000
        conditions = self._conditions_of(branches, len(x) // (self._prompts * len(branches)))
        if self._family.network == "unet":
            output = self._network(x, t, **conditions, return_dict=False)[0]
        else:
            output = self._network(hidden_states=x, timestep=t, **conditions, return_dict=False)[0]
        return output[:, : x.shape[1]] if self._family.mean_only else output

    def _conditions_of(self, branches: tuple[Branch, ...], each: int) -> dict[str, Any]:
        """The network's conditions with ``each`` rows a prompt."""
        if each != self._rows_each:
            self._rows, self._rows_each = {}, each
        if branches not in self._rows:
            chosen = [self._conditions[branch] for branch in branches]
            with torch.inference_mode(False):  # they are kept, and gradients may be wanted later
                self._rows[branches] = {
                    name: joined([map_rows(one[name], lambda v: v.repeat_interleave(each, 0)) for one in chosen])
                    if name in ROWS
                    else chosen[0][name]
                    for name in chosen[0]
                }
        return self._rows[branches]

    # ---------------------------------------------------------------- recordings

    def recordable(self, batch: int) -> BranchedDenoiser:
        """A copy whose conditions are tensors of its own, for a recording of calls with so many samples."""
        twin = copy.copy(self)
        twin._rows_each = batch // self._prompts
        twin._rows = {
            branches: {name: map_rows(value, torch.clone) for name, value in rows.items()}
            for branches, rows in self._all_rows(batch).items()
        }
        return twin

    def load(self, other: BranchedDenoiser, batch: int) -> None:
        """Takes the conditions of another denoiser with an equal ``recording_key``, in the place of those before."""
        theirs = other._all_rows(batch)
        for branches, rows in self._rows.items():
            for name, value in rows.items():
                _copy(value, theirs[branches][name])

    def recording_key(self, batch: int) -> Hashable:
        """What a recording of calls cannot change: the network, where its weights are, and the conditions' kinds."""
        kinds = (
            (branches, name, _kind(value))
            for branches, rows in self._all_rows(batch).items()
            for name, value in sorted(rows.items())
        )
        weights = (*self._network.parameters(), *self._network.buffers())
        places = hash(tuple(weight.data_ptr() for weight in weights))
        return id(self._network), places, self._family, self.guidance_rescale, batch // self._prompts, *kinds

    @property
    def is_moved(self) -> bool:
        """Whether hooks move the network's weights between devices: offloading, layerwise casting."""

        def has_hooks(module: torch.nn.Module) -> bool:
            registry = getattr(module, "_diffusers_hook", None)
            return hasattr(module, "_hf_hook") or (registry is not None and len(registry.hooks) > 0)

        return any(map(has_hooks, self._network.modules()))

    def _all_rows(self, batch: int) -> dict[tuple[Branch, ...], dict[str, Any]]:
        """The conditions of every call of the network in a run."""
        first = self._family.first if self.is_guided else ("conditional",)
        parts = [(name,) for name in self._conditions] if first is None else [first]
        return {branches: self._conditions_of(branches, batch // self._prompts) for branches in parts}

    # ---------------------------------------------------------------- before and after

    def prepare(
        self,
        scheduler: Any,
        num_inference_steps: int,
        *,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> Start:
        if latents is None:
            return Start(self._start(scheduler, num_inference_steps, generator), scheduler.timesteps)
        self._check("latents", latents)
        if "latents" in self._call.parameters:
            first = self._start(scheduler, num_inference_steps, private_generator(), latents=latents)
        else:
            like = self._start(scheduler, num_inference_steps, private_generator())
            first = latents.to(like.device, like.dtype)
        return Start(first, scheduler.timesteps)

    def noise(self, generator: Generators = None) -> torch.Tensor:
        return self._start(OneTimestep(self.scheduler_config), 1, generator)

    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        self._check("latents", latents)
        if output_type == "latent":
            return latents
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type {output_type!r} is unknown; use pil, np, pt or latent")
        with_graph = torch.is_grad_enabled() and output_type == "pt"

        def end(model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            torch.set_grad_enabled(with_graph)  # until the pipeline's call returns
            # A pipeline that doubles its samples keeps the first half.
            return torch.cat([latents] * (len(sample) // self._batch_size)).to(self._dtype)

        scheduler = SchedulerStandIn(OneTimestep(self.scheduler_config), end)
        networks = {self._family.network: BlankNetwork(self._network)}
        return self._call(scheduler, 1, private_generator(), output_type=output_type, networks=networks)

    def _start(
        self,
        scheduler: Any,
        num_inference_steps: int,
        generator: Generators,
        *,
        latents: torch.Tensor | None = None,
        blank: BlankNetwork | None = None,
    ) -> torch.Tensor:
        """The first latents of the pipeline's run, whose network is not called."""
        networks = {self._family.network: blank or BlankNetwork(self._network)}
        first = self._call.first_sample(scheduler, num_inference_steps, generator, latents=latents, networks=networks)
        return first if self._family.prompts is None else first[: self._batch_size]

    def _check(self, name: str, x: torch.Tensor) -> None:
        check_samples(name, x, self._shape)
        if len(x) % self._prompts:
            raise ValueError(f"{name} has a batch of {len(x)} for {self._prompts} prompts; give each as many samples")


def _kind(value: Any) -> Hashable:
    """A condition without the numbers in its tensors."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device, value.stride()
    if isinstance(value, Mapping):
        return tuple((key, _kind(part)) for key, part in sorted(value.items()))
    return repr(value)


def _copy(target: Any, source: Any) -> None:
    if isinstance(target, torch.Tensor):
        target.copy_(source)
    elif isinstance(target, Mapping):
        for key, part in target.items():
            _copy(part, source[key])
