"""Claims on masked diffusion, by a table of short sequences whose law is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from fewstep.guidance import MaskedSampler
from fewstep.metrics import Estimate

from .claims import Finding, Measurement, Scale, percent
from .known_laws import leave_one_out, mean_of

_LENGTH, _VOCABULARY = 4, 3
_LARGE, _INTERVALS = 50257, 256
"""Tokens of GPT-2, and steps of a sampler, of which one is made."""


def masked(scale: Scale) -> Measurement:
    """First hitting against ancestral sampling on a known law, and Gumbel noise in float32."""
    count = 20_000 if scale.quick else 200_000
    sequences = np.array(list(itertools.product(range(_VOCABULARY), repeat=_LENGTH)))
    known = torch.from_numpy(sequences)
    law = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(len(sequences), 0.4)))
    one_hot = torch.nn.functional.one_hot(known, _VOCABULARY).double()

    def model(tokens: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        agrees = ((tokens[:, None] == known) | (tokens[:, None] == _VOCABULARY)).all(2)
        return torch.einsum("bs,slv->blv", agrees * law, one_hot).clamp(min=1e-300).log()

    def error(steps: int | None) -> tuple[Estimate, int]:
        sampler = MaskedSampler(model, length=_LENGTH, vocabulary=_VOCABULARY)
        generator = torch.Generator().manual_seed(0)
        if steps is None:
            tokens = sampler.first_hitting(count, generator=generator)
        else:
            tokens = sampler.ancestral(count, steps=steps, generator=generator)
        numbers = (tokens * _VOCABULARY ** torch.arange(_LENGTH - 1, -1, -1)).sum(1).view(20, -1)
        counts = torch.stack([torch.bincount(row, minlength=len(law)) for row in numbers]).double()
        return leave_one_out(lambda m: _variation(counts[m].sum(0), law), 20), sampler.calls

    first, calls = error(None)
    few, _ = error(_LENGTH)
    many, more = error(25 * _LENGTH)
    loss = first - many
    return Measurement(
        [
            Finding(f"error of the law, {calls} calls against {calls} of ancestral sampling", *percent(few, first)),
            Finding(
                f"error of the law, {calls} calls against {more} of ancestral sampling: loss",
                loss.value,
                *loss.interval(),
                0.0,
                "no more than",
                "",
            ),
            _gumbel(12_000 if scale.quick else 100_000),
        ]
    )


def _variation(counts: torch.Tensor, law: torch.Tensor) -> float:
    return float(0.5 * (counts / counts.sum() - law).abs().sum())


def _gumbel(positions: int) -> Finding:
    """How many tokens appear in a step where the mask competes with them in one categorical of Gumbel noise.

    All tokens are equally likely: the network knows nothing yet.
    """
    generator = torch.Generator().manual_seed(0)
    token = math.log(1.0 / (_INTERVALS * _LARGE))
    mask = math.log1p(-1.0 / _INTERVALS)
    appeared = []
    for _ in range(0, positions, 100):
        gumbel = torch.rand(100, _LARGE + 1, generator=generator).log_().neg_().log_().neg_()
        appeared.append(int((gumbel[:, 1:].amax(1) + token > gumbel[:, 0] + mask).sum()))
    nominal = 100.0 / _INTERVALS
    shares = 100.0 * (torch.tensor(appeared).double() / nominal - 1.0)
    return mean_of(
        f"Gumbel noise in float32, {_LARGE} equal tokens, one of {_INTERVALS} steps: tokens that appear",
        shares,
        "at most",
        "%",
    )
