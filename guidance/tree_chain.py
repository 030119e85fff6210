"""What a tree searches over: a Markov chain whose samples may stand at different steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Chain(Protocol):
    """A Markov chain that is searched, such as a ``DenoisingChain``; discrete ones may have states of any dtype.

    Attributes:
        steps: number of network calls from start to end.
        noisy: for each step, whether copies of a sample part in it.
        state_shape: of the state of one sample.
        device: of the states.
        fingerprint: of the chain; a saved tree goes on with the same one only.
    """

    @property
    def steps(self) -> int: ...
    @property
    def noisy(self) -> Sequence[bool]: ...
    @property
    def state_shape(self) -> tuple[int, ...]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def fingerprint(self) -> str: ...

    def start(self, seeds: Sequence[int]) -> torch.Tensor:
        """States before the first step, ``(len(seeds), *state_shape)``."""
        ...

    def advance(self, states: torch.Tensor, positions: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """The states after one step of each sample's own, drawn by its seed and its position alone."""
        ...

    def results(self, states: torch.Tensor) -> torch.Tensor:
        """What the reward judges, of states after the last step."""
        ...


def branching_steps(branching: int | Sequence[int], chain: Chain) -> tuple[int, ...]:
    """The steps before which a tree branches.

    Args:
        branching: how many, evenly spread from the first on, or the steps themselves.
        chain: that is searched.

    Raises:
        ValueError: steps that the chain does not have, or after which copies do not part.
    """
    if isinstance(branching, int):
        if not 1 <= branching <= chain.steps:
            raise ValueError(f"branching {branching} must lie in 1 to {chain.steps}, the steps of the chain")
        steps = [round(k * chain.steps / branching) for k in range(branching)]
    else:
        steps = [int(step) for step in branching]
        if not steps or steps != sorted({*steps}) or not 0 <= steps[0] <= steps[-1] < chain.steps:
            raise ValueError(
                f"branching {list(branching)} must be rising numbers of steps, from 0 to {chain.steps - 1}"
            )
    for first, last in zip(steps, [*steps[1:], chain.steps], strict=True):
        if not any(chain.noisy[first:last]):
            raise ValueError(
                f"branching at step {first} makes equal children: no step before {last} draws noise; use a stochastic "
                "sampler such as SAMPLERS['sde-dpm++1'], or fewer branches (the last step of DDPM draws none)"
            )
    return tuple(steps)
