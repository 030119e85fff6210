"""A pipeline's own call with another scheduler or network in it; the pipeline itself is left as it is."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput

Generators = torch.Generator | Sequence[torch.Generator] | None
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``step(model_output, sample)``: the next sample."""

_RUN = "is an argument of prepare and sample, not of the denoiser"
_NOT_INPUTS: Mapping[str, str] = {
    **dict.fromkeys(("generator", "latents", "num_inference_steps"), _RUN),
    **dict.fromkeys(("timesteps", "sigmas", "mu", "eta"), "belongs to the scheduler; set its timesteps or options"),
    "output_type": "is an argument of decode",
    "return_dict": "has no meaning here: decode returns images",
    "batch_size": "is called num_images_per_prompt here",
    "num_videos_per_prompt": "is called num_images_per_prompt here",
    "denoising_end": "ends a run of the pipeline; run over fewer of the scheduler's timesteps",
    **dict.fromkeys(
        ("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
        "is called after the pipeline's steps, and there are none; write it into your own loop",
    ),
}


class Stopped(BaseException):
    """Ends a pipeline's call; not an ``Exception``, which a pipeline may catch.

    Attributes:
        sample: what the pipeline handed to its step.
    """

    def __init__(self, sample: torch.Tensor) -> None:
        super().__init__()
        self.sample = sample


class SchedulerStandIn:
    """In a pipeline's call, a scheduler that steps otherwise; all the rest is the scheduler's.

    Args:
        scheduler: what it stands in for.
        step: what happens in place of a step.
    """

    def __init__(self, scheduler: Any, step: Step) -> None:
        self._scheduler, self._step = scheduler, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def __len__(self) -> int:
        return len(self._scheduler)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise ValueError("the pipeline copies its scheduler to run two at once, and only one can be stood in for")

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself: whoever calls a denoiser has scaled it."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As of a scheduler; the noise, generators and options of a real step are not looked at."""
        following = self._step(model_output, sample)
        # Pipelines of consistency models decode the second.
        return SchedulerOutput(prev_sample=following) if return_dict else (following, following)


class OneTimestep:
    """Stands for the scheduler of a call of which only the start or the end matters.

    Args:
        config: of the pipeline's scheduler, which pipelines read.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Takes what any scheduler takes."""
        self.timesteps = torch.ones(1, device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """There is one."""


class BlankNetwork(torch.nn.Module):
    """In a pipeline's call, a network that is not computed: it notes its arguments and returns zeros.

    Args:
        network: what it stands in for.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple, or it would be a part of this module
        self.noted: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_network"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput:
        """Notes the arguments by name."""
        given = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        self.noted.append(given)
        sample = given["sample"] if "sample" in given else given["hidden_states"]
        shape = list(sample.shape)
        if len(shape) == 4:
            shape[1] = self.config.out_channels or shape[1]
        return Transformer2DModelOutput(sample=sample.new_zeros(shape))


class PipelineCall:
    """The call of a pipeline with fixed inputs, to be run with stand-ins; its prompts are encoded once.

    Args:
        pipeline: of diffusers; later changes of its components are not followed.
        inputs: of the call.
    """

    def __init__(self, pipeline: Any, inputs: Mapping[str, Any]) -> None:
        self._pipeline = copy.copy(pipeline)
        self._inputs = dict(inputs)
        self._encoded: list[Any] = []
        self.parameters = inspect.signature(type(pipeline).__call__).parameters

    def __call__(
        self,
        scheduler: Any,
        num_inference_steps: int,
        generator: Generators,
        *,
        latents: torch.Tensor | None = None,
        output_type: str = "latent",
        networks: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs it and returns its images or whatever it makes.

        Args:
            scheduler: in the place of the pipeline's.
            num_inference_steps: of the run.
            generator: of the first latents; a list gives each sample its own.
            latents: in the place of those.
            output_type: of the result, if the pipeline has a choice.
            networks: by component, what takes their place.

        Raises:
            ValueError: ``latents`` or a generator for a pipeline that takes none.
        """
        # A copy a run: what pipelines write to themselves on the way stays apart.
        own: Any = copy.copy(self._pipeline)
        vars(own).update(scheduler=scheduler, _progress_bar_config={"disable": True}, **(networks or {}))
        if hasattr(own, "encode_prompt"):
            vars(own)["encode_prompt"] = self._remembered(self._pipeline.encode_prompt)
        given: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        given["generator"] = list(generator) if isinstance(generator, Sequence) else generator
        if latents is not None:
            given["latents"] = latents
        for name in given:
            if name not in self.parameters:
                raise ValueError(f"{name} is nothing that a {type(own).__name__} takes; it cannot be driven with it")
        if "output_type" in self.parameters:
            given["output_type"] = output_type
        if "return_dict" in self.parameters:
            given["return_dict"] = False
        with torch.inference_mode(False):  # or what is kept of the run could not be differentiated through
            return own(**self._inputs, **given)[0]

    def first_sample(
        self,
        scheduler: Any,
        num_inference_steps: int,
        generator: Generators,
        *,
        latents: torch.Tensor | None = None,
        networks: Mapping[str, Any],
    ) -> torch.Tensor:
        """What the pipeline would hand to its first step; the scheduler has its timesteps then."""

        def stop(model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            raise Stopped(sample)

        try:
            self(SchedulerStandIn(scheduler, stop), num_inference_steps, generator, latents=latents, networks=networks)
        except Stopped as stopped:
            return stopped.sample
        raise ValueError(f"{type(self._pipeline).__name__} made no step; give inputs with which it denoises")

    def free(self) -> None:
        """Moves the networks away that the pipeline moves away at the end of a call."""
        self._pipeline.maybe_free_model_hooks()

    def _remembered(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """``encode_prompt`` whose k-th call in a run returns what it did in the first run: the inputs are the same."""
        calls = iter(range(2**31))

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            k = next(calls)
            if k == len(self._encoded):
                self._encoded.append(encode(*args, **kwargs))
            return self._encoded[k]

        return encode_prompt


def check_inputs(pipeline: Any, inputs: Mapping[str, Any], num_images_per_prompt: int) -> None:
    """Refuses what no call of the pipeline could be made of.

    Raises:
        ValueError: no pipeline of diffusers, or one without scheduler; an argument that its call does not take, or
            that has its place elsewhere; or one that is missing.
    """
    name = type(pipeline).__name__
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(f"pipeline is a {name}; give a DiffusionPipeline")
    if getattr(pipeline, "scheduler", None) is None:
        raise ValueError(f"{name} has no scheduler, so there is nothing to denoise; give a diffusion pipeline")
    if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt={num_images_per_prompt!r} must be a whole number of at least 1")
    parameters = inspect.signature(type(pipeline).__call__).parameters
    for argument in inputs:
        if argument in _NOT_INPUTS:
            raise ValueError(f"{argument} {_NOT_INPUTS[argument]}")
        if argument not in parameters:
            known = [p for p in list(parameters)[1:] if p not in _NOT_INPUTS]
            raise ValueError(f"{argument} is no argument of {name}; it takes {', '.join(known)}")
    for argument, parameter in list(parameters.items())[1:]:
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and argument not in (*inputs, *_NOT_INPUTS):
            raise ValueError(f"{name} needs {argument}; give it to the denoiser")
    for part, component in pipeline.components.items():
        if getattr(component, "is_cache_enabled", False):
            raise ValueError(
                f"the {part} of {name} reuses what it computed in the step before, and a denoiser is asked in any "
                f"order; call its disable_cache"
            )
    if any(getattr(part, "by", None) == "step" for part in _stitched(pipeline)):
        raise ValueError(
            'a StitchedDenoiser with by="step" counts the steps of a pipeline, and a denoiser makes none; '
            'use by="timestep"'
        )


def private_generator() -> torch.Generator:
    """For noise that nobody looks at, so that torch's global state stays where it is."""
    return torch.Generator().manual_seed(0)


def _stitched(pipeline: Any) -> list[Any]:
    from ..stitch import StitchedDenoiser

    return [part.config for part in pipeline.components.values() if isinstance(part, StitchedDenoiser)]
