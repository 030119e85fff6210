"""A picture of a search tree."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.samplers.files import replaced

from .tree import Tree

_FORMATS = (".png", ".svg", ".pdf")


def plot_tree(tree: Tree, branching: Sequence[int], steps: int, path: Path, reward: str) -> None:
    """Draws nodes by depth, their size by visits and their colour by value, and the rewards over the network calls.

    Args:
        tree: with leaves.
        branching: the steps before which it branches.
        steps: of the chain.
        path: of the picture, ending in .png, .svg or .pdf.
        reward: name of the reward.

    Raises:
        ValueError: another suffix, or no matplotlib.
    """
    if path.suffix not in _FORMATS:
        raise ValueError(f"path {path} must end in one of {', '.join(_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('plot needs matplotlib; install it with pip install "fewstep[plot]"')
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    nodes, growth = figure.subplots(1, 2)
    _draw_nodes(figure, nodes, tree, ["root", *(f"step {step}" for step in branching), f"step {steps}"], reward)
    leaves = tree.leaves
    calls, rewards = np.array(tree.calls)[leaves], tree.values[leaves]
    growth.plot(calls, rewards, ".", markersize=3, alpha=0.5, label="each rollout")
    growth.step(calls, np.maximum.accumulate(rewards), where="post", label="best so far")
    growth.set(xlabel="network calls", ylabel=reward)
    growth.legend()
    with replaced(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)


def _draw_nodes(figure: Any, panel: Any, tree: Tree, labels: Sequence[str], reward: str) -> None:
    across, depths = _across(tree), np.array(tree.depths)
    parents = np.array(tree.parents)[1:]
    panel.plot(
        np.stack([across[1:], across[parents]]),
        np.stack([depths[1:], depths[parents]]),
        color="0.8",
        linewidth=0.4,
        zorder=1,
    )
    size = 4.0 + 120.0 * tree.visits / tree.visits.max()
    drawn = panel.scatter(across, depths, s=size, c=tree.values, cmap="viridis", zorder=2)
    panel.set_yticks(range(tree.depth + 1), labels)
    panel.set_xticks([])
    panel.invert_yaxis()
    panel.set(title=f"{len(tree)} nodes; area: visits")
    figure.colorbar(drawn, ax=panel, label=f"value ({reward})")


def _across(tree: Tree) -> np.ndarray:
    """Places from left to right: leaves side by side, others above the middle of their children."""
    places = np.zeros(len(tree))
    pending, taken = [0], 0
    order = []
    while pending:
        node = pending.pop()
        order.append(node)
        pending.extend(reversed(tree.children[node]))
        if not tree.children[node]:
            places[node] = taken
            taken += 1
    for node in reversed(order):
        if tree.children[node]:
            places[node] = places[tree.children[node]].mean()
    return places
