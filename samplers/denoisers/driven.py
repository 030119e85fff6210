"""Denoisers of the pipelines that cannot be taken apart: their own loop, asked for one evaluation at a time."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .call import Generators, PipelineCall, check_inputs, private_generator
from .denoiser import Denoiser, Start, check_samples, time_label
from .run import Evaluated, PipelineRun

if TYPE_CHECKING:
    from typing_extensions import Self

_REPEATS = ("num_images_per_prompt", "num_videos_per_prompt", "batch_size")


class DrivenDenoiser(Denoiser):
    """The denoiser of any pipeline: its call is under way in a thread of its own, and waits in every step to be asked.

    Conditions, guidance, ControlNets and conventions of sign and time are the pipeline's, whatever they are. What it
    costs:

    - A batch has always ``batch_size`` samples; different timesteps in one batch are a call of the network each.
    - The branches of guidance cannot be had by themselves.
    - The first call after a ``decode`` starts the pipeline again (prompts stay encoded), and evaluates the network
      once more where the pipeline takes no ``latents``. ``decode`` before any call evaluates it once.
    - Inputs whose effect depends on the number of the step (ControlNets that stop early, skipped layers) count calls;
      in ``sample`` that is the same.

    The thread runs only while a method waits for it. It ends with ``close``, a ``with`` block, or the object.

    Args:
        pipeline: of diffusers.
        num_images_per_prompt: samples of each prompt, neighbours in the batch.
        inputs: arguments of the pipeline's call.

    Raises:
        ValueError: inputs that the call does not take; ``num_images_per_prompt`` for a pipeline without; or a
            ``DiTPipeline``, which doubles its samples and is taken apart instead.
    """

    def __init__(self, pipeline: Any, *, num_images_per_prompt: int = 1, **inputs: Any) -> None:
        check_inputs(pipeline, inputs, num_images_per_prompt)
        name = type(pipeline).__name__
        if name == "DiTPipeline":
            raise ValueError("a DiTPipeline steps with doubled samples and is not driven; use BranchedDenoiser")
        self._call = PipelineCall(pipeline, inputs)
        if num_images_per_prompt > 1:
            repeat = next((argument for argument in _REPEATS if argument in self._call.parameters), None)
            if repeat is None:
                raise ValueError(
                    f"num_images_per_prompt={num_images_per_prompt}: a {name} makes one sample of its inputs; repeat "
                    "the inputs"
                )
            self._call = PipelineCall(pipeline, {**inputs, repeat: num_images_per_prompt})
        self.scheduler_config = pipeline.scheduler.config
        self._scheduler = copy.deepcopy(pipeline.scheduler)
        self._steps = 50
        self._output_type = "pil"
        self._run: PipelineRun | None = None
        self._finalizer: Any = None
        self._like: torch.Tensor | None = None
        self._first: Evaluated | None = None

    @property
    def batch_size(self) -> int:
        return len(self._samples())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._samples().shape[1:])

    # ---------------------------------------------------------------- predictions

    def __call__(self, x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        self._check("x", x)
        t = time_label(t, x)
        if t.ndim == 0:
            return self._prediction(x, t)
        first, *others = t.unique()
        prediction = self._prediction(x, first)
        for label in others:
            chosen = (t == label).view(-1, *[1] * (x.ndim - 1))
            prediction = torch.where(chosen, self._prediction(x, label), prediction)
        return prediction

    def _prediction(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x_seen = x.to(self._samples().dtype)
        if self._run is None:
            self._begin(self._scheduler, self._steps, private_generator(), self._latents(x), t)
        known, self._first = self._first, None
        # A known prediction may lack the graph that is wanted now.
        if known is None or torch.is_grad_enabled() or not known.is_of(x_seen, t):
            known = self._evaluate(x_seen, t)
        return known.output.to(x.dtype)

    # ---------------------------------------------------------------- before and after

    def prepare(
        self,
        scheduler: Any,
        num_inference_steps: int,
        *,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> Start:
        if latents is not None:
            self._check("latents", latents)
        timesteps = self._begin(scheduler, num_inference_steps, generator, latents)
        assert self._first is not None
        return Start(self._first.sample.clone(), timesteps)

    def noise(self, generator: Generators = None) -> torch.Tensor:
        like = self._samples()
        chosen = list(generator) if isinstance(generator, Sequence) else generator
        return randn_tensor(tuple(like.shape), generator=chosen, device=like.device, dtype=like.dtype)

    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        check_samples("latents", latents, self.shape)
        if output_type != self._output_type:
            self.close()
            self._output_type = output_type
        if self._run is None:
            self._begin(self._scheduler, self._steps, private_generator(), self._latents(latents))
        like = self._samples()
        with torch.set_grad_enabled(torch.is_grad_enabled() and output_type in ("pt", "latent")):
            return self._let_go().finish(latents.to(like.dtype))

    def close(self) -> None:
        """Ends the pipeline's call that is under way; the next use starts another one."""
        if self._run is not None:
            self._let_go().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---------------------------------------------------------------- the run under way

    def _begin(
        self,
        scheduler: Any,
        steps: int,
        generator: Generators,
        latents: torch.Tensor | None,
        t: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Starts the pipeline, evaluates its first samples at its first timestep or at ``t``; returns the timesteps."""
        self.close()
        call = functools.partial(
            self._call,
            num_inference_steps=steps,
            generator=generator,
            latents=latents,
            output_type=self._output_type,
        )
        run = PipelineRun(call, scheduler, self._call.free)
        timesteps = run.start()
        self._run, self._finalizer = run, weakref.finalize(self, run.abandon)
        self._finalizer.atexit = False  # a thread that waits is stopped with the interpreter
        self._first = self._evaluate(None, timesteps[0] if t is None else t)
        if self._like is None:
            self._like = self._first.sample.detach().clone()
        return timesteps

    def _evaluate(self, x: torch.Tensor | None, t: torch.Tensor) -> Evaluated:
        assert self._run is not None
        try:
            evaluated = self._run.evaluate(x, t)
        except BaseException:
            self._let_go().abandon()
            raise
        self._count(evaluated.sample)
        return evaluated

    def _let_go(self) -> PipelineRun:
        run, self._run, self._first = self._run, None, None
        assert run is not None
        self._finalizer.detach()
        return run

    def _samples(self) -> torch.Tensor:
        """Samples of the pipeline, for their shape, dtype and device."""
        if self._like is None:
            self._begin(self._scheduler, self._steps, private_generator(), None)
        assert self._like is not None
        return self._like

    def _latents(self, x: torch.Tensor) -> torch.Tensor | None:
        """What lets the pipeline start with these samples, if anything does."""
        return x.detach().to(self._samples().dtype) if "latents" in self._call.parameters else None

    def _check(self, name: str, x: torch.Tensor) -> None:
        like = self._samples()
        check_samples(name, x, tuple(like.shape[1:]))
        if len(x) != len(like):
            raise ValueError(
                f"{name} has a batch of {len(x)}; the pipeline's run has {len(like)}, set by its prompts and "
                "num_images_per_prompt"
            )
