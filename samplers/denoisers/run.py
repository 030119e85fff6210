"""A pipeline's call that waits in every step to be told the next samples and their time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from .call import SchedulerStandIn

_Times = Callable[[torch.Tensor], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of the network by the pipeline.

    Attributes:
        output: what the pipeline handed to its step.
        sample: of what.
        label: at which time.
    """

    output: torch.Tensor
    sample: torch.Tensor
    label: torch.Tensor

    def is_of(self, x: torch.Tensor, t: torch.Tensor) -> bool:
        """Whether it is the evaluation of these samples at this time."""
        return float(t) == float(self.label) and torch.equal(x.to(self.sample.dtype), self.sample)


@dataclass(frozen=True)
class _Request:
    """Samples, and the time at which to evaluate them; without a time, the pipeline ends its loop with them."""

    samples: Any
    label: torch.Tensor | None
    enter_modes: Callable[[], None]


@dataclass(frozen=True)
class _Ready:
    timesteps: torch.Tensor


@dataclass(frozen=True)
class _Finished:
    result: Any


class _Closed(BaseException):
    """Ends the call."""


class PipelineRun:
    """A pipeline's call in a thread, which runs only while a method here waits for it.

    Args:
        call: runs the pipeline with a scheduler.
        scheduler: whose config, timesteps and noise levels the pipeline sees.
        free: called when the call is ended before its end.
    """

    def __init__(self, call: Callable[[Any], Any], scheduler: Any, free: Callable[[], None]) -> None:
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._replies: SimpleQueue[Any] = SimpleQueue()
        self._due: torch.Tensor | None = None
        self._label: torch.Tensor | None = None
        self._stepped = True
        arguments = (call, _AskingScheduler(scheduler, self), free, _current_modes())
        self._thread = threading.Thread(target=self._main, args=arguments, name="pipeline", daemon=True)

    # ---------------------------------------------------------------- the caller's side

    def start(self) -> torch.Tensor:
        """Runs the pipeline up to its loop and returns the timesteps that it is about to go through."""
        self._thread.start()
        reply = self._reply()
        if not isinstance(reply, _Ready):
            raise ValueError("the pipeline went through no timesteps; give inputs with which it denoises")
        return reply.timesteps

    def evaluate(self, samples: torch.Tensor | None, label: torch.Tensor) -> Evaluated:
        """Evaluates samples, or the pipeline's own first ones; the first evaluation is of those in any case.

        Raises:
            ValueError: the pipeline does not come back to its step, or not with these samples.
        """
        self._requests.put(_Request(samples, label, _current_modes()))
        reply = self._reply()
        if not isinstance(reply, Evaluated):
            raise ValueError("the pipeline ended its loop by itself, so that it cannot be asked any further")
        if samples is not None and reply.sample is not samples and not torch.equal(reply.sample, samples):
            self.close()
            raise ValueError(
                "the pipeline changes the samples between its step and its network (as inpainting does), so that its "
                "prediction is no function of them; a network that takes the mask as input can be driven"
            )
        return reply

    def finish(self, samples: torch.Tensor) -> Any:
        """Ends the loop with these samples, after an evaluation; returns what the pipeline makes of them."""
        self._requests.put(_Request(samples, None, _current_modes()))
        reply = self._reply()
        if not isinstance(reply, _Finished):
            self.close()
            raise ValueError("the pipeline did not end with its timesteps; it cannot decode")
        self._thread.join()
        return reply.result

    def abandon(self) -> None:
        """Ends the call without waiting for it; from any thread, at any time."""
        self._requests.put(None)

    def close(self) -> None:
        """Ends the call."""
        self.abandon()
        self._thread.join()

    def _reply(self) -> Any:
        try:
            reply = self._replies.get()
        except BaseException:  # an interrupt: the answer would come to the next question
            self.abandon()
            raise
        if isinstance(reply, BaseException):
            self._thread.join()
            try:
                raise reply
            finally:
                del reply  # its traceback knows this frame
        return reply

    # ---------------------------------------------------------------- the pipeline's side

    def _main(
        self, call: Callable[[Any], Any], scheduler: Any, free: Callable[[], None], enter_modes: Callable[[], None]
    ) -> None:
        # A context of the caller may end between two requests, and what it cached with it.
        torch.set_autocast_cache_enabled(False)
        enter_modes()
        try:
            self._replies.put(_Finished(call(scheduler)))
        except _Closed:
            free()
        except BaseException as error:
            self._replies.put(error)

    def times(self, timesteps: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the pipeline goes through: the labels that are asked for."""
        self._replies.put(_Ready(timesteps))
        self._await()
        while self._due is not None:
            label, self._due, self._stepped = self._due, None, False
            yield label
            if not self._stepped:
                raise ValueError("the pipeline goes on without a step, so that it cannot be asked step by step")

    def step(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """In place of a scheduler's step."""
        if self._stepped:
            raise ValueError(
                "the pipeline makes other steps than one for each of its scheduler's timesteps, so that it cannot be "
                "asked step by step"
            )
        self._stepped = True
        assert self._label is not None
        self._replies.put(Evaluated(model_output, sample, self._label))
        return self._await()

    def _await(self) -> Any:
        request = self._requests.get()
        if request is None:
            raise _Closed
        request.enter_modes()
        self._due = self._label = request.label
        return request.samples


class _AskingScheduler(SchedulerStandIn):
    """The scheduler that the pipeline sees."""

    def __init__(self, scheduler: Any, run: PipelineRun) -> None:
        super().__init__(scheduler, run.step)
        self._run = run

    @property
    def timesteps(self) -> torch.Tensor:
        return _AskingTimesteps.of(self._scheduler.timesteps, self._run.times)


# Beside indexing: what pipelines do with timesteps that leaves them the same timesteps.
_COPIES = frozenset({"to", "cpu", "cuda", "float", "clone", "detach", "contiguous"})


class _AskingTimesteps(torch.Tensor):
    """A run's timesteps, which ask for the next label when they are gone through; so do slices and copies."""

    _times: _Times

    @classmethod
    def of(cls, timesteps: torch.Tensor, times: _Times) -> _AskingTimesteps:
        own = timesteps.as_subclass(cls)
        own._times = times
        return own

    def __iter__(self) -> Iterator[torch.Tensor]:
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.as_subclass(torch.Tensor)
        return self._times(plain)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        same = func is torch.Tensor.__getitem__ or getattr(func, "__name__", "") in _COPIES
        if same and isinstance(args[0], cls) and type(result) is torch.Tensor and result.ndim == 1:
            return cls.of(result, args[0]._times)
        return result


def _current_modes() -> Callable[[], None]:
    """Enters this thread's modes of autograd and autocast and its CUDA stream in another one."""
    gradients = torch.is_grad_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
    kinds = ["cpu", *(["cuda"] if stream else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]

    def enter() -> None:
        torch.set_grad_enabled(gradients)
        for kind, enabled, dtype in autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if stream is not None:
            torch.cuda.set_stream(stream)

    return enter
