"""Diffusion tree sampling and search: rewards found at the ends of rollouts steer the next ones (arXiv 2506.20701)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .rewards import Reward, RewardFunction
from .tree import Leaves
from .tree_chain import Chain
from .tree_growth import TreeMethod

SELECTIONS = ("boltzmann", "uniform")


class DiffusionTreeSampling(TreeMethod):
    """Samples from ``p(x) exp(scale * reward(x))``, by a tree of denoising runs that grows as long as one likes.

    ``tree = DiffusionTreeSampling(DenoisingChain(denoiser, scheduler, 50), reward)``, ``tree.run(10000)``,
    ``denoiser.decode(tree.sample(16).samples)``; then ``tree.run(10000)`` again.

    Every rollout goes down the tree, to children in proportion to ``exp(scale * value)``, until a node has fewer
    children than ``factor * visits ** exponent``. From there the sampler runs to the end, and the reward goes back up:
    a node's value is ``log(mean(exp(scale * value of its children))) / scale``. Results are drawn from the finished
    rollouts by walking down in the same way, at no network call.

    It is exact in the limit only. Children that were unlucky are not visited again, so values, and with them
    ``log_evidence``, are too low at practical budgets; ``selection="uniform"`` leaves ``exp(log_evidence)`` unbiased at
    any. Measured on a Gaussian in 50 steps with a quadratic reward, log evidence -0.93 and mean 1.37 (8 trees):

    ==========  ========  =======================  =======================
    iterations  calls     boltzmann                uniform
    ==========  ========  =======================  =======================
    50          2,500     -0.97 +- 0.05, 1.34      -0.93 +- 0.05, 1.36
    500         25,000    -1.04 +- 0.02, 1.31      -0.94 +- 0.01, 1.36
    1500        75,000    -1.05 +- 0.01, 1.31      -0.93 +- 0.01, 1.37
    ==========  ========  =======================  =======================

    With the paper's widening (2, 0.8) a node is only searched below after 36 rollouts; before, the method is importance
    sampling of whole runs. Lower it for budgets of a few hundred rollouts. Scale rewards so that ``scale * reward``
    differs by a few units.

    Args:
        chain: what is sampled: ``DenoisingChain(denoiser, scheduler, steps)``.
        reward: of its results; a ``Reward`` to decode them first.
        scale: inverse temperature ``lambda``; 0 is the sampler's own law.
        branching: at how many evenly spread steps the tree branches, or the steps themselves; 0 is pure noise.
        widening: ``(factor, exponent)``: how many children a node may have, by its visits.
        selection: ``boltzmann``, or ``uniform`` among a node's children.
        parallel: rollouts in one batch, each at its own time. The first ones all begin at the root, so keep it well
            below their number. 1 for pipelines that are driven as they are.
        seed: of everything random; ``None`` draws one from torch's global state.
        max_nodes: bound of the memory: each node keeps one state of the chain.
        device: where states are kept, such as ``"cpu"``; ``None`` is the chain's.

    Raises:
        ValueError: impossible options.
    """

    def __init__(
        self,
        chain: Chain,
        reward: Reward | RewardFunction,
        *,
        scale: float = 1.0,
        branching: int | Sequence[int] = 5,
        widening: tuple[float, float] = (2.0, 0.8),
        selection: str = "boltzmann",
        parallel: int = 1,
        seed: int | None = None,
        max_nodes: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self._check_scale(scale)
        if selection not in SELECTIONS:
            raise ValueError(f"selection {selection!r} is unknown; use one of {', '.join(SELECTIONS)}")
        super().__init__(
            chain,
            reward,
            scale=scale,
            branching=branching,
            widening=widening,
            parallel=parallel,
            seed=seed,
            max_nodes=max_nodes,
            device=device,
        )
        self.selection = selection

    @property
    def log_evidence(self) -> float:
        """Logarithm of the estimate of ``E[exp(scale * reward)]`` under the sampler: ``scale`` times the root's value.

        Raises:
            ValueError: there is no finished rollout.
        """
        self._leaves(1)
        return self.scale * float(self.tree.values[0])

    @property
    def root_log_evidence(self) -> float:
        """The same by the rollouts that began at the root alone: no search, unbiased, of higher variance.

        Raises:
            ValueError: there is no finished rollout.
        """
        self._leaves(1)
        terms = self.scale * self.tree.values[self.tree.root_rollouts]
        return float(np.logaddexp.reduce(terms) - math.log(len(terms)))

    @property
    def leaf_probabilities(self) -> np.ndarray:
        """With which probability ``sample`` draws each of ``tree.leaves``, ``(leaves,)``."""
        probabilities = np.zeros(len(self.tree))
        probabilities[0] = 1.0
        for node, children in enumerate(self.tree.children):
            if children:
                probabilities[children] = probabilities[node] * self._weights(np.array(children))
        return probabilities[self.tree.leaves]

    def sample(self, count: int = 1, *, seed: int = 0) -> Leaves:
        """Draws independently from the finished rollouts, with replacement, at no network call.

        Args:
            count: number of samples.
            seed: of the draw, beside the tree's own; another one draws anew.

        Raises:
            ValueError: there is no finished rollout, or an impossible count.
        """
        leaves = self._leaves(1)
        if count < 1:
            raise ValueError(f"count {count} must be at least 1")
        probabilities = self.leaf_probabilities
        drawn = np.random.default_rng(self._entropy(2, seed)).choice(
            len(leaves), count, p=probabilities / probabilities.sum()
        )
        return self._results(leaves[drawn])

    def _choose(self, node: int, children: np.ndarray, random: np.random.Generator) -> int:
        if self.selection == "uniform":
            return int(random.integers(len(children)))
        return int(random.choice(len(children), p=self._weights(children)))

    def _weights(self, children: np.ndarray) -> np.ndarray:
        values = self.scale * self.tree.values[children]
        weights = np.exp(values - values.max())
        return np.asarray(weights / weights.sum())

    def _check_scale(self, scale: float) -> None:
        if not 0.0 <= scale < math.inf:
            raise ValueError(f"scale {scale} must be at least 0; for low rewards negate the reward")

    def _options(self) -> Mapping[str, Any]:
        return {"selection": self.selection}


class DiffusionTreeSearch(TreeMethod):
    """DTS*: searches for the highest reward, by the same tree with the rule of UCT (arXiv 2506.20701).

    ``tree = DiffusionTreeSearch(DenoisingChain(denoiser, scheduler, 50), reward)``, ``tree.run(10000)``,
    ``denoiser.decode(tree.best().samples)``; then ``tree.run(10000)`` again.

    Selection goes to the child of the highest ``value + exploration * sqrt(log(visits of the node) / visits)``; all
    else is as in ``DiffusionTreeSampling``. Rewards should differ by about 1 for the default exploration. A search
    trusts its reward: watch the results for what the reward does not see.

    Args:
        chain: what is searched: ``DenoisingChain(denoiser, scheduler, steps)``.
        reward: of its results; a ``Reward`` to decode them first.
        scale: of the soft mean that values are backed up by, as in the paper; infinity takes the maximum, which follows
            single good finds.
        branching: see ``DiffusionTreeSampling``.
        widening: see ``DiffusionTreeSampling``.
        exploration: the constant of UCT, in units of the reward; the paper does not give its own.
        parallel: see ``DiffusionTreeSampling``.
        seed: see ``DiffusionTreeSampling``.
        max_nodes: see ``DiffusionTreeSampling``.
        device: see ``DiffusionTreeSampling``.

    Raises:
        ValueError: impossible options.
    """

    def __init__(
        self,
        chain: Chain,
        reward: Reward | RewardFunction,
        *,
        scale: float = 1.0,
        branching: int | Sequence[int] = 5,
        widening: tuple[float, float] = (2.0, 0.8),
        exploration: float = 1.0,
        parallel: int = 1,
        seed: int | None = None,
        max_nodes: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self._check_scale(scale)
        if not 0.0 <= exploration < math.inf:
            raise ValueError(f"exploration {exploration} must be at least 0, which always goes on with the best child")
        super().__init__(
            chain,
            reward,
            scale=scale,
            branching=branching,
            widening=widening,
            parallel=parallel,
            seed=seed,
            max_nodes=max_nodes,
            device=device,
        )
        self.exploration = exploration

    def _choose(self, node: int, children: np.ndarray, random: np.random.Generator) -> int:
        visits = self.tree.visits
        bonus = np.sqrt(math.log(visits[node] + 1) / (visits[children] + 1))
        return int(np.argmax(self.tree.values[children] + self.exploration * bonus))

    def _check_scale(self, scale: float) -> None:
        if not scale >= 0.0:
            raise ValueError(f"scale {scale} must be at least 0, and infinity for the maximum")

    def _options(self) -> Mapping[str, Any]:
        return {"exploration": self.exploration}
