"""A whole run as one recording: denoiser and steps over buffers that stay where they are."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .denoisers.denoiser import Denoiser
from .fused.backend import FusedRows, check_backend, pass_for
from .fused.operands import torch_pass
from .fused.table import PlanTable
from .noise import NoiseToDraw
from .rows import GuidedOutput, accumulation_dtype, compiled
from .scheduler import PlanScheduler
from .trajectory import limits_of

if TYPE_CHECKING:
    from .denoisers.branched import BranchedDenoiser

Generators = torch.Generator | Sequence[torch.Generator] | None
Recorder = Callable[[Callable[[], None]], Callable[[], object]]
"""Runs a body of tensor operations and returns what repeats them on the same tensors."""

CAPACITY = 4
"""Recordings that are kept, each with the memory of a run."""

_RECORDINGS: OrderedDict[tuple[Any, ...], LoopRecording] = OrderedDict()
_LOCK = threading.RLock()
"""Between the loading of a recording and its end no other thread may load it."""


def clear_graphs() -> None:
    """Forgets the recordings of ``sample(..., graph=True)`` and frees their memory.

    Needed after the code of a network was changed (its attention processors, LoRA layers); weights that were changed in
    place are seen, and those that lie elsewhere (``to``) are recorded anew.
    """
    _RECORDINGS.clear()


def sample_recorded(
    denoiser: Denoiser,
    scheduler: Any,
    num_inference_steps: int,
    *,
    generator: Generators = None,
    latents: torch.Tensor | None = None,
    record: Recorder | None = None,
) -> torch.Tensor:
    """``sample`` by a recording, which is made where there is none for such a run.

    Args:
        denoiser: as of ``sample``; one that takes its pipeline apart.
        scheduler: of ours, without guidance.
        num_inference_steps: as of ``sample``.
        generator: as of ``sample``.
        latents: as of ``sample``.
        record: what records; a CUDA graph.

    Raises:
        ValueError: no CUDA device, a denoiser or scheduler that does more than tensor operations, a network whose
            weights are moved, or autocast.
    """
    from .denoisers.branched import BranchedDenoiser

    if not isinstance(denoiser, BranchedDenoiser):
        raise ValueError(
            f"graph=True needs a denoiser that takes its pipeline apart, and a {type(denoiser).__name__} drives it as "
            "it is; leave graph out"
        )
    if not isinstance(scheduler, PlanScheduler) or not scheduler.is_plain:
        raise ValueError(
            f"graph=True needs a scheduler of ours that does what its plan says alone, and {type(scheduler).__name__} "
            "does not (guidance is taken away by guide(None)); use another one, or leave graph out"
        )
    if denoiser.is_moved:
        raise ValueError(
            "graph=True needs a network that stays where it is, and this one has hooks that may move its weights "
            "(offloading, casting); leave graph out"
        )
    # Buffers that outlive the call are no inference tensors, which nothing may write to later.
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        x, timesteps = denoiser.prepare(scheduler, num_inference_steps, generator=generator, latents=latents)
        if torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                "graph=True cannot run under torch.autocast, whose casts of the weights do not outlive it; leave one "
                "of them out"
            )
        if record is None:
            if x.device.type != "cuda":
                raise ValueError(
                    f"graph=True needs a pipeline on a CUDA device, not on {x.device.type}; leave graph out"
                )
            record = functools.partial(record_cuda_graph, device=x.device)
        run = _Run(denoiser, scheduler, x, timesteps, generator)
        found = _RECORDINGS.pop(run.key, None)
        if found is None:
            found = LoopRecording(run, record)
        else:
            found.load(run)
        _RECORDINGS[run.key] = found
        while len(_RECORDINGS) > CAPACITY:
            _RECORDINGS.popitem(last=False)
        return found.replay()


def record_cuda_graph(body: Callable[[], None], *, device: torch.device) -> Callable[[], object]:
    """Captures a body in a CUDA graph, after two runs in which kernels are compiled and libraries set up."""
    stream = _stream_of(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                body()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            body()
    return graph.replay


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a device: libraries keep a workspace for every stream that they saw."""
    return torch.cuda.Stream(device)


class _Run:
    """What is to be run.

    Attributes:
        key: equal for runs that one recording serves.
    """

    def __init__(
        self,
        denoiser: BranchedDenoiser,
        scheduler: PlanScheduler,
        first: torch.Tensor,
        timesteps: torch.Tensor,
        generator: Generators,
    ) -> None:
        self.denoiser, self.scheduler, self.first, self.timesteps = denoiser, scheduler, first, timesteps
        self.limits, self.in_scales = limits_of(scheduler), [call.in_scale for call in scheduler.plan]
        calls, self.slots = compiled(scheduler.plan, fold=self.limits is None)
        self.table = PlanTable(calls, self.slots, clip=self.limits is not None)
        self.noisy = tuple(call.is_stochastic for call in scheduler.plan)
        self.noises = scheduler.noises(first, generator)
        self.wide = accumulation_dtype(first.dtype)
        one_pass = pass_for(check_backend(scheduler.backend), first.device)
        self.one_pass = torch_pass if one_pass is None or self.wide is torch.float64 else one_pass
        self.is_scaled = any(scale != 1.0 for scale in self.in_scales)
        self.is_rescaled = denoiser.guidance_rescale > 0.0
        self.key = (
            denoiser.recording_key(len(first)),
            (tuple(first.shape), first.stride(), first.dtype, first.device, timesteps.dtype),
            tuple(self.table.layouts),
            (self.noisy, self.limits, self.is_scaled, self.one_pass, scheduler.config.variance_type),
            # Where the kernel draws, the number of the first step is one of its arguments.
            tuple(noise.first_step if isinstance(noise, NoiseToDraw) else None for noise in self.noises),
        )


class LoopRecording:
    """The buffers of a run and its recording.

    What may differ between runs is in buffers: first sample, time labels, coefficients, input scales, conditions,
    guidance scale, and noise or seeds.

    Args:
        run: the first one.
        record: what records.
    """

    def __init__(self, run: _Run, record: Recorder) -> None:
        self._batch = len(run.first)
        self._denoiser = run.denoiser.recordable(self._batch)
        device = run.first.device
        self._first, self._labels = run.first.clone(), run.timesteps.to(device, copy=True)
        self._result = torch.empty_like(run.first)
        self._in_scales = torch.tensor(run.in_scales, dtype=run.wide, device=device) if run.is_scaled else None
        self._guidance_scale = torch.full((), run.denoiser.guidance_scale, dtype=run.wide, device=device)
        self._noises = [
            NoiseToDraw(noise.seeds.clone(), noise.first_step) if isinstance(noise, NoiseToDraw) else noise.clone()
            for noise in run.noises
        ]
        self._rows = FusedRows(run.table, run.limits, run.one_pass, device, run.wide)
        self._replay = record(lambda: self._body(run))

    def load(self, run: _Run) -> None:
        """Takes another run with the same key."""
        self._denoiser.load(run.denoiser, self._batch)
        self._first.copy_(run.first)
        self._labels.copy_(run.timesteps)
        if self._in_scales is not None:
            self._in_scales.copy_(torch.tensor(run.in_scales, dtype=run.wide), non_blocking=True)
        self._guidance_scale.fill_(run.denoiser.guidance_scale)
        for ours, theirs in zip(self._noises, run.noises, strict=True):
            if isinstance(ours, NoiseToDraw):
                assert isinstance(theirs, NoiseToDraw)
                ours.seeds.copy_(theirs.seeds)
            else:
                assert isinstance(theirs, torch.Tensor)
                ours.copy_(theirs)
        self._rows.load(run.table)

    def replay(self) -> torch.Tensor:
        """The result of the run that was loaded."""
        self._replay()
        return self._result.clone()

    def _body(self, run: _Run) -> None:
        """The run over the buffers; of ``run`` only what the key holds."""
        x, state = self._first, None
        values: list[Any] = [None] * run.slots
        noises = iter(self._noises)
        for k, label in enumerate(self._labels):
            seen = x if self._in_scales is None else (x * self._in_scales[k]).to(x.dtype)
            output = self._output(run, seen, label)
            noise = next(noises) if run.noisy[k] else None
            results = self._rows.execute(k, values, state, x, output, noise, clean=False)
            x, state = results.following, results.state
        self._result.copy_(x)

    def _output(self, run: _Run, seen: torch.Tensor, label: torch.Tensor) -> torch.Tensor | GuidedOutput:
        denoiser = self._denoiser
        if not denoiser.is_guided:
            output = denoiser.conditional(seen, label)
            return output if output.shape == seen.shape else run.scheduler._mean_of(output, seen)
        both = denoiser.branches(seen, label)
        if not run.is_rescaled:
            return run.scheduler._both_means(GuidedOutput(*both, self._guidance_scale), seen)
        denoiser.guidance_scale = self._guidance_scale  # type: ignore[assignment]  # a number in a buffer
        return denoiser.guided(*both)
