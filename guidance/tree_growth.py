"""How a search tree over a denoising chain grows: selection, widening, rollouts at different times, backup."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .rewards import Reward, RewardFunction
from .tree import Leaves, Rollout, Tree, soft_mean
from .tree_chain import Chain, branching_steps

if TYPE_CHECKING:
    from typing_extensions import Self


class TreeMethod(ABC):
    """What tree sampling and tree search share; see there.

    Attributes:
        tree: the nodes.
        network_calls: made so far, counted for each sample.
    """

    network_calls: int = 0

    def __init__(
        self,
        chain: Chain,
        reward: Reward | RewardFunction,
        *,
        scale: float,
        branching: int | Sequence[int],
        widening: tuple[float, float],
        parallel: int,
        seed: int | None,
        max_nodes: int | None,
        device: str | torch.device | None,
    ) -> None:
        factor, exponent = widening
        if not 0.0 < factor < math.inf or not 0.0 < exponent <= 1.0:
            raise ValueError(f"widening {widening} must be a factor above 0 and an exponent above 0, at most 1")
        if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
            raise ValueError(f"parallel {parallel!r} must be a whole number of at least 1")
        self.chain, self.reward, self.scale = chain, Reward.of(reward), float(scale)
        self.branching, self.widening, self.parallel = branching_steps(branching, chain), (factor, exponent), parallel
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.tree = Tree(len(self.branching) + 1, chain.state_shape, device)
        if max_nodes is not None and max_nodes < 1 + self.tree.depth:
            raise ValueError(f"max_nodes {max_nodes} is too small for one rollout; give at least {1 + self.tree.depth}")
        self.max_nodes = max_nodes
        self._rollouts: list[Rollout] = []
        self._iterations = self._started = 0

    # ---------------------------------------------------------------- growing

    @torch.no_grad()
    def run(self, network_calls: int | None = None, *, seconds: float | None = None) -> int:
        """Grows the tree, from where it stands: two runs make the same tree as one of both budgets.

        A budget that ends in the middle of a rollout is spent to the last call; the next run goes on from there.

        Args:
            network_calls: budget, counted for each sample of a batch.
            seconds: budget, looked at between network calls.

        Returns:
            the number of network calls made; less than the budget when ``max_nodes`` is reached.

        Raises:
            ValueError: no budget, a full tree, or a reward that is no finite number (the tree is as before it).
        """
        if network_calls is None and seconds is None:
            raise ValueError("run needs a budget: network_calls, seconds, or both")
        for name, budget in (("network_calls", network_calls), ("seconds", seconds)):
            if budget is not None and not budget >= 0:
                raise ValueError(f"{name} {budget} must be at least 0")
        begin, before = time.monotonic(), self.network_calls
        while network_calls is None or self.network_calls - before < network_calls:
            if seconds is not None and time.monotonic() - begin >= seconds:
                break
            limit = None if network_calls is None else network_calls - (self.network_calls - before)
            if not self._tick(limit):
                if self.network_calls == before:
                    raise ValueError(
                        f"max_nodes {self.max_nodes} is reached, the tree is full; take its results, or raise max_nodes"
                    )
                break
        return self.network_calls - before

    def _tick(self, limit: int | None) -> int:
        """One step of every rollout, or of as many as the limit allows; the next tick then moves the others."""
        if self._rollouts and all(r.moved for r in self._rollouts):
            self._settle()
        if not any(r.moved for r in self._rollouts):
            self._fill()
        chosen = [r for r in self._rollouts if not r.moved][:limit]
        if not chosen:
            return 0
        states = self.chain.advance(
            torch.stack([r.state for r in chosen]), [r.position for r in chosen], [r.seed for r in chosen]
        )
        self.network_calls += len(chosen)
        for r, state in zip(chosen, states, strict=True):
            r.state, r.position, r.moved = state, r.position + 1, True
            if r.position in self.branching or r.position == self.chain.steps:
                r.trail.append(state.clone())
        if all(r.moved for r in self._rollouts):
            self._settle()
        return len(chosen)

    def _fill(self) -> None:
        """Selects nodes until enough rollouts are under way."""
        while len(self._rollouts) < self.parallel:
            coming = sum(self.tree.depth - self.tree.depths[r.node] for r in self._rollouts)
            if self.max_nodes is not None and len(self.tree) + coming + self.tree.depth > self.max_nodes:
                return
            node = self._select()
            if self.tree.depths[node] < self.tree.depth:
                self._rollouts.append(self._rollout(node))
                self._started += 1
            # Those under way count too, so that rollouts of one batch go different ways.
            self.tree.visits[self.tree.path(node)] += 1
            self._iterations += 1

    def _select(self) -> int:
        """Goes down from the root to a node that may have another child, or to a leaf."""
        random = np.random.default_rng(self._entropy(1, self._iterations))
        factor, exponent = self.widening
        node = 0
        while self.tree.depths[node] < self.tree.depth:
            children = self.tree.children[node]
            coming = sum(r.node == node for r in self._rollouts)
            if not children or len(children) + coming < factor * (self.tree.visits[node] + 1) ** exponent:
                break
            node = children[self._choose(node, np.array(children), random)]
        return node

    @abstractmethod
    def _choose(self, node: int, children: np.ndarray, random: np.random.Generator) -> int:
        """Which of a node's children selection goes on to."""

    def _rollout(self, node: int) -> Rollout:
        seed = int(self._entropy(0, self._started).generate_state(1, np.uint64)[0] >> 1)
        if node:
            position = self.branching[self.tree.depths[node] - 1]
            return Rollout(node, seed, position, self.tree.states([node], self.chain.device)[0])
        state = self.chain.start([seed])[0]
        return Rollout(0, seed, 0, state, [state] if self.branching[0] == 0 else [])

    def _settle(self) -> None:
        """Ends the step: rollouts that are over become nodes, and values go up to the root."""
        over = [r for r in self._rollouts if r.position == self.chain.steps]
        if over:
            samples = self.chain.results(torch.stack([r.state for r in over]))
            rewards = self.reward(samples, f"network call {self.network_calls}").tolist()
            for r, reward in zip(over, rewards, strict=True):
                self._add(r, reward)
        self._rollouts = [r for r in self._rollouts if r.position < self.chain.steps]
        for r in self._rollouts:
            r.moved = False

    def _add(self, rollout: Rollout, reward: float) -> None:
        node = rollout.node
        for state in rollout.trail:
            node = self.tree.add(node, state, self.network_calls)
            self.tree.values[node], self.tree.visits[node] = reward, 1
        for ancestor in self.tree.path(rollout.node):
            self._back_up(ancestor)

    def _back_up(self, node: int) -> None:
        # The mean over children: a sum would grow with their number.
        self.tree.values[node] = soft_mean(self.tree.values[self.tree.children[node]], self.scale)

    def _entropy(self, *key: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.seed % 2**64, spawn_key=key)

    # ---------------------------------------------------------------- results

    def best(self, count: int = 1) -> Leaves:
        """The leaves of the highest rewards, the best first.

        Raises:
            ValueError: there are not so many.
        """
        leaves = self._leaves(count)
        order = np.argsort(-self.tree.values[leaves], kind="stable")[:count]
        return self._results(leaves[order])

    @torch.no_grad()
    def rescore(self, reward: Reward | RewardFunction | None = None, *, scale: float | None = None) -> None:
        """Values the tree by another reward or scale, at no network call.

        Its nodes stay where the old reward has led the search; the next runs follow the new one.

        Args:
            reward: in the place of the old one.
            scale: in the place of the old one.

        Raises:
            ValueError: an impossible scale, or a reward that is no finite number; the tree is as before.
        """
        scale = self.scale if scale is None else float(scale)
        self._check_scale(scale)
        if reward is not None:
            new, leaves = Reward.of(reward), self.tree.leaves
            parts = [leaves[k : k + 64] for k in range(0, len(leaves), 64)]
            rewards = [new(self._samples(part), "the leaves of the tree").double().cpu().numpy() for part in parts]
            self.reward = new
            if rewards:
                self.tree.values[leaves] = np.concatenate(rewards)
        self.scale = scale
        for node in reversed(range(len(self.tree))):
            if self.tree.children[node]:
                self._back_up(node)

    def plot(self, path: str | Path) -> None:
        """Draws the tree (depth, visits, values) and the rewards found over the network calls.

        Args:
            path: of the picture, ending in .png, .svg or .pdf.

        Raises:
            ValueError: another suffix, no matplotlib, or a tree without leaves.
        """
        from .tree_plot import plot_tree

        self._leaves(1)
        plot_tree(self.tree, self.branching, self.chain.steps, Path(path), str(self.reward.name))

    @abstractmethod
    def _check_scale(self, scale: float) -> None:
        """Refuses an impossible scale."""

    def _leaves(self, count: int) -> np.ndarray:
        leaves = self.tree.leaves
        if count < 1:
            raise ValueError(f"count {count} must be at least 1")
        if len(leaves) < count:
            raise ValueError(
                f"the tree has {len(leaves)} leaves, fewer than {count}; a whole rollout takes {self.chain.steps} "
                "network calls, so run it for longer"
            )
        return leaves

    def _samples(self, nodes: np.ndarray) -> torch.Tensor:
        return self.chain.results(self.tree.states(nodes.tolist(), self.chain.device))

    def _results(self, nodes: np.ndarray) -> Leaves:
        return Leaves(self._samples(nodes), torch.from_numpy(self.tree.values[nodes]))

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Writes the tree with what is under way into the folder ``path``: safetensors and JSON."""
        settings = {
            "method": type(self).__name__,
            "chain": self.chain.fingerprint,
            "scale": self.scale if math.isfinite(self.scale) else "inf",
            "branching": list(self.branching),
            "widening": list(self.widening),
            "parallel": self.parallel,
            "seed": self.seed,
            "max_nodes": self.max_nodes,
            "iterations": self._iterations,
            "started": self._started,
            "network_calls": self.network_calls,
            **self._options(),
        }
        self.tree.save(path, self._rollouts, settings)

    @classmethod
    def load(
        cls,
        path: str | Path,
        chain: Chain,
        reward: Reward | RewardFunction,
        *,
        device: str | torch.device | None = None,
    ) -> Self:
        """Reads a tree that ``save`` wrote; it goes on as if it had never been away.

        Args:
            path: the folder.
            chain: the same as of the saved tree.
            reward: the same as of the saved tree; ``rescore`` afterwards takes another one.
            device: where states are kept, ``None`` for the chain's.

        Raises:
            ValueError: no tree, that of another method or chain, or a damaged one.
        """
        found = Tree.read_settings(path)
        try:
            method, fingerprint, iterations, started, network_calls = (
                found.pop(key) for key in ("method", "chain", "iterations", "started", "network_calls")
            )
        except KeyError as error:
            raise ValueError(f"path {path} holds a damaged tree: {error} is missing; save it again") from None
        if method != cls.__name__:
            raise ValueError(f"path {path} holds a tree of {method}; load it with {method}.load")
        if fingerprint != chain.fingerprint:
            raise ValueError(
                f"path {path} holds the tree of another chain; give the same scheduler options, steps and latents"
            )
        found["scale"], found["widening"] = float(found["scale"]), tuple(found["widening"])
        tree = cls(chain, reward, device=device, **found)
        tree._rollouts = tree.tree.restore(path, chain.device)
        tree._iterations, tree._started, tree.network_calls = iterations, started, network_calls
        return tree

    def _options(self) -> Mapping[str, Any]:
        """Options of the method beside the common ones, JSON-ready."""
        return {}
