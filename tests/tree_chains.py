"""Markov chains of few states, whose soft values and tilted laws are known exactly, as chains that trees search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class FiniteChain:
    """A chain on the states 0, 1, ... with an exact soft value function.

    Args:
        prior: of the first state, ``(states,)``.
        transitions: of each step, ``(states, states)``.
    """

    state_shape, device, fingerprint = (1,), torch.device("cpu"), "finite"

    def __init__(self, prior: Sequence[float], transitions: Sequence[np.ndarray]) -> None:
        self.prior, self.transitions = np.array(prior), [np.array(p) for p in transitions]
        self.steps = len(self.transitions)
        self.noisy = (True,) * self.steps
        self.evaluations = 0

    @classmethod
    def random(cls, states: int = 4, steps: int = 3, seed: int = 0) -> FiniteChain:
        random = np.random.default_rng(seed)
        rows = random.dirichlet(np.full(states, 0.7), size=(steps, states))
        return cls(random.dirichlet(np.full(states, 2.0)), list(rows))

    def start(self, seeds: Sequence[int]) -> torch.Tensor:
        drawn = [np.random.default_rng((seed, 99)).choice(len(self.prior), p=self.prior) for seed in seeds]
        return torch.tensor(drawn)[:, None]

    def advance(self, states: torch.Tensor, positions: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        self.evaluations += len(states)
        drawn = [
            np.searchsorted(
                np.cumsum(self.transitions[position][state]), np.random.default_rng((seed, position)).random()
            )
            for state, position, seed in zip(states[:, 0].tolist(), positions, seeds, strict=True)
        ]
        return torch.tensor(np.array(drawn))[:, None].clamp(max=len(self.prior) - 1)

    def results(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, 0]

    def base_law(self) -> np.ndarray:
        """Of the last state."""
        law = self.prior
        for transition in self.transitions:
            law = law @ transition
        return law

    def weights(self, rewards: np.ndarray, scale: float) -> list[np.ndarray]:
        """``E[exp(scale * reward) | state]`` before each step and after the last."""
        found = [np.exp(scale * rewards)]
        for transition in reversed(self.transitions):
            found.insert(0, transition @ found[0])
        return found

    def evidence(self, rewards: np.ndarray, scale: float) -> float:
        return float(self.prior @ self.weights(rewards, scale)[0])


class WordChain:
    """Every step appends a digit, each as likely as the others: the leaves are all words of a length."""

    device, fingerprint = torch.device("cpu"), "words"

    def __init__(self, length: int, digits: int) -> None:
        self.steps, self.digits = length, digits
        self.noisy = (True,) * length
        self.state_shape = (length,)
        self.evaluations = 0

    def start(self, seeds: Sequence[int]) -> torch.Tensor:
        return torch.zeros(len(seeds), self.steps, dtype=torch.int64)

    def advance(self, states: torch.Tensor, positions: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        self.evaluations += len(states)
        states = states.clone()
        for row, position, seed in zip(states, positions, seeds, strict=True):
            row[position] = int(np.random.default_rng((seed, position)).integers(self.digits))
        return states

    def results(self, states: torch.Tensor) -> torch.Tensor:
        return states
