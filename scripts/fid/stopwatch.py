"""Where the time of an evaluation goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fewstep.metrics import FeatureExtractor

from ..generation.model import Model

_PARTS = {
    "denoiser": ("forward", ("unet", "transformer", "transformer_2")),
    "encoders": ("forward", ("text_encoder", "text_encoder_2", "text_encoder_3")),
    "decoder": ("decode", ("vae", "vqvae")),
}
"""What is timed -> the method, and the parts of pipelines that have it."""


class Stopwatch:
    """Seconds in the networks of a pipeline and in the feature extractor, and in all.

    Args:
        device: that computes; it is waited for at the ends of what is timed, so a watched run is slower on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(("denoiser", "decoder", "encoders", "features", "all"), 0.0)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time of a block."""
        begin = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - begin

    @contextmanager
    def watch(self, model: Model, extractor: FeatureExtractor) -> Iterator[None]:
        """Times the networks, and the block as a whole."""
        watched: list[tuple[Any, str, str]] = [
            (component, method, name)
            for name, (method, parts) in _PARTS.items()
            for part in parts
            if (component := getattr(model.pipeline, part, None)) is not None
        ]
        watched.append((extractor, "features_and_logits", "features"))
        before = [vars(thing).get(method) for thing, method, _ in watched]
        for thing, method, name in watched:
            setattr(thing, method, self._timed(getattr(thing, method), name))
        try:
            with self.measure("all"):
                yield
        finally:
            for (thing, method, _), own in zip(watched, before, strict=True):
                if own is None:
                    delattr(thing, method)
                else:
                    setattr(thing, method, own)

    def shares(self) -> dict[str, float]:
        """Of the whole time, the parts that took some, and the rest, which is everything that is no network."""
        whole = self.seconds["all"]
        parts = {name: seconds / whole for name, seconds in self.seconds.items() if name != "all" and seconds}
        return {**parts, "the rest": 1.0 - sum(parts.values())}

    def _timed(self, inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measure(name):
                return inner(*args, **kwargs)

        return timed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
