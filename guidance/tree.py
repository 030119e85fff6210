"""The tree of a tree search: nodes in flat arrays, their states in blocks, and the folder they are saved in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fewstep.samplers.files import replaced

_FORMAT, _VERSION = "fewstep.tree", 1
_BLOCK = 64


class Leaves(NamedTuple):
    """Results of a tree.

    Attributes:
        samples: ``(count, *shape)``, for a denoiser's ``decode``.
        rewards: ``(count,)``, float64.
    """

    samples: torch.Tensor
    rewards: torch.Tensor


def soft_mean(values: np.ndarray, scale: float) -> float:
    """``log(mean(exp(scale * values))) / scale``; the mean at scale 0, the maximum at infinity."""
    top = float(values.max())
    if scale == 0.0:
        return float(values.mean())
    if math.isinf(scale) or len(values) == 1:
        return top
    return top + math.log(float(np.exp(scale * (values - top)).mean())) / scale


@dataclass
class Rollout:
    """A sample on its way from a node of the tree to its end.

    Attributes:
        node: from which it started.
        seed: of its noise.
        position: how many steps it has made, counted from pure noise.
        state: as it stands, ``state_shape``.
        trail: its states at the branching times that it has passed; last, when it is over, the final one.
        moved: whether it has made the step that is under way.
    """

    node: int
    seed: int
    position: int
    state: torch.Tensor
    trail: list[torch.Tensor] = field(default_factory=list)
    moved: bool = False


class Tree:
    """Nodes ``0, 1, ...`` in the order of their making; 0 is the root, which has no state.

    Args:
        depth: of the leaves; the root's is 0.
        state_shape: of the state of one sample.
        device: where states are kept; ``None`` is where they come from.

    Attributes:
        parents: ``(nodes,)``; the root's is -1.
        depths: ``(nodes,)``.
        calls: ``(nodes,)``, how many network calls had been made when the node was added.
        children: of each node, in the order of their making.
    """

    def __init__(self, depth: int, state_shape: Sequence[int], device: str | torch.device | None = None) -> None:
        self.depth, self.state_shape = depth, tuple(state_shape)
        self.device = None if device is None else torch.device(device)
        self.parents, self.depths, self.calls = [-1], [0], [0]
        self.children: list[list[int]] = [[]]
        self._values, self._visits = np.zeros(_BLOCK), np.zeros(_BLOCK, np.int64)
        self._blocks: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def values(self) -> np.ndarray:
        """``(nodes,)``, float64: of a leaf its reward, of others the estimate of the soft value; may be written to."""
        return self._values[: len(self)]

    @property
    def visits(self) -> np.ndarray:
        """``(nodes,)``: how many rollouts and selections went through each node; may be written to."""
        return self._visits[: len(self)]

    @property
    def leaves(self) -> np.ndarray:
        """Numbers of the leaves, in the order of their making."""
        return np.flatnonzero(np.array(self.depths) == self.depth)

    @property
    def root_rollouts(self) -> np.ndarray:
        """The leaves whose whole path was drawn from the sampler at a time: independent of all rewards."""
        found = []
        for node in self.children[0]:
            while self.children[node]:
                node = self.children[node][0]
            found.append(node)
        return np.array(found, np.int64)

    def add(self, parent: int, state: torch.Tensor, calls: int) -> int:
        """Appends a child; returns its number."""
        node = len(self)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.calls.append(calls)
        self.children.append([])
        self.children[parent].append(node)
        if node == len(self._values):
            self._values = np.concatenate([self._values, np.zeros_like(self._values)])
            self._visits = np.concatenate([self._visits, np.zeros_like(self._visits)])
        block, place = divmod(node - 1, _BLOCK)
        if block == len(self._blocks):
            shape = (_BLOCK, *self.state_shape)
            self._blocks.append(torch.empty(shape, dtype=state.dtype, device=self.device or state.device))
        self._blocks[block][place] = state
        return node

    def path(self, node: int) -> list[int]:
        """The node and its ancestors, up to the root."""
        nodes = [node]
        while node:
            node = self.parents[node]
            nodes.append(node)
        return nodes

    def states(self, nodes: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
        """States ``(len(nodes), *state_shape)``, on the given device or where they are kept."""
        places = [divmod(int(node) - 1, _BLOCK) for node in nodes]
        return torch.stack([self._blocks[block][place] for block, place in places]).to(device)

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path, rollouts: Sequence[Rollout], settings: Mapping[str, Any]) -> None:
        """Writes ``tree.safetensors`` and ``tree.json`` into the folder ``path``."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        nodes = range(1, len(self))
        tensors = {
            "parents": torch.tensor(self.parents),
            "calls": torch.tensor(self.calls),
            "values": torch.from_numpy(self.values.copy()),
            "visits": torch.from_numpy(self.visits.copy()),
        }
        if len(nodes):
            tensors["states"] = self.states(nodes).cpu()
        if rollouts:
            tensors["rollouts"] = torch.stack([state.cpu() for r in rollouts for state in (r.state, *r.trail)])
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "nodes": len(self),
            "rollouts": [
                {"node": r.node, "seed": r.seed, "position": r.position, "trail": len(r.trail), "moved": r.moved}
                for r in rollouts
            ],
            "settings": settings,
        }
        header = json.dumps(content, indent=1) + "\n"
        # The numbers that both files know tell whether one was written without the other.
        stamp = {"settings": json.dumps(settings)}
        for name, data in (("tree.safetensors", save(tensors, stamp)), ("tree.json", header.encode())):
            with replaced(path / name) as partial:
                partial.write_bytes(data)

    @staticmethod
    def read_settings(path: str | Path) -> dict[str, Any]:
        """The settings that a tree was saved with.

        Raises:
            ValueError: the folder holds no tree.
        """
        return dict(_content(Path(path))["settings"])

    def restore(self, path: str | Path, device: torch.device) -> list[Rollout]:
        """Fills this new tree with a saved one; returns the rollouts that were under way.

        Args:
            path: the folder.
            device: of the rollouts.

        Raises:
            ValueError: the folder holds no tree, or one of other states, or is damaged.
        """
        path = Path(path)
        content = _content(path)
        try:
            with safe_open(path / "tree.safetensors", framework="pt") as file:
                stamp = (file.metadata() or {}).get("settings")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if stamp != json.dumps(content["settings"]):
                raise ValueError("its two files are of different times")
            parents, calls = tensors["parents"].tolist(), tensors["calls"].tolist()
            if len(parents) != content["nodes"]:
                raise ValueError(f"{len(parents)} nodes, of {content['nodes']}")
            states = tensors.get("states", torch.empty(0, *self.state_shape))
            if tuple(states.shape) != (len(parents) - 1, *self.state_shape):
                raise ValueError(f"states of shape {tuple(states.shape[1:])}, not {self.state_shape}")
            kept = states.to(self.device or device)
            for parent, state, call in zip(parents[1:], kept, calls[1:], strict=True):
                self.add(parent, state, call)
            self.values[:], self.visits[:] = tensors["values"].numpy(), tensors["visits"].numpy()
            flying = iter(tensors["rollouts"].to(device) if content["rollouts"] else ())
            return [
                Rollout(
                    r["node"],
                    r["seed"],
                    r["position"],
                    next(flying),
                    trail=[next(flying) for _ in range(r["trail"])],
                    moved=r["moved"],
                )
                for r in content["rollouts"]
            ]
        except (OSError, SafetensorError, KeyError, IndexError, StopIteration, ValueError) as error:
            raise ValueError(f"path {path} holds a damaged tree: {error}; save it again") from None


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / "tree.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"path {path} holds no tree: {error}; give the folder that save wrote") from None
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"path {path} holds no tree of version {_VERSION}; give the folder that save wrote")
    if {"nodes", "rollouts", "settings"} - set(content):
        raise ValueError(f"path {path} holds a damaged tree: tree.json lacks entries; save it again")
    return content
