"""The picture of a steered run: reward against network calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import check_files
from ..plots import check_plot, save_figure
from .steering import Steering


def check_reward_plot(path: Path, steering: Steering | None) -> None:
    """Refuses what ``plot_rewards`` could not draw, before anything is made.

    Raises:
        ValueError: an unknown suffix, no folder, no matplotlib, or a run in which no reward is followed.
    """
    if steering is None or not steering.rewards or not steering.kind.particles:
        raise ValueError("plot draws the rewards of a steered run: give --reward and a --steer that follows it")
    check_plot(path)
    check_files(path)


def plot_rewards(steering: Steering, accounts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a thin line an image and the mean of all.

    Of searches and trees it is the best image so far; of populations and SVDD the mean of the particles' predictions,
    and of the finished particles at the end.

    Args:
        steering: of the run.
        accounts: of its images, with their histories.
        path: of the picture, ending in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.subplots()
    curves = [reward_curve(steering, account["history"]) for account in accounts]
    for calls, rewards in curves:
        panel.step(calls, rewards, where="post", color="#0072B2", linewidth=0.8, alpha=0.35)
    every = np.unique(np.concatenate([calls for calls, _ in curves]))
    first = max(calls[0] for calls, _ in curves)
    common = every[every >= first]
    held = [rewards[np.searchsorted(calls, common, side="right") - 1] for calls, rewards in curves]
    panel.step(common, np.mean(held, axis=0), where="post", color="#D55E00", linewidth=2, label="mean of the images")
    what = "best image so far" if steering.kind.finds else "mean of the particles, as predicted"
    panel.set(xlabel="network calls an image", ylabel=f"reward: {' + '.join(steering.rewards)}")
    panel.set_title(f"{steering.method}: {what}", fontsize="medium")
    panel.legend()
    panel.grid(alpha=0.3)
    save_figure(figure, path)


def reward_curve(steering: Steering, history: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Network calls and rewards of one image; see `plot_rewards`."""
    calls = np.array([entry["network_calls"] for entry in history])
    if steering.kind.finds:
        return calls, np.maximum.accumulate(np.array([entry["best"] for entry in history]))
    return calls, np.array([entry["mean"] for entry in history])
