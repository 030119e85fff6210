"""The training loop that the recipes share: moving average, cosine decay, exact resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm


def train(
    model: nn.Module,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    checkpoint: Path,
    weight_decay: float = 0.0,
    warmup: int = 200,
    average: float = 0.999,
    save_every: int = 500,
    seed: int = 0,
) -> dict[str, float]:
    """Trains ``model`` in place and leaves the moving average of its weights in it.

    Every step draws from a generator seeded with ``(seed, step)``, and the checkpoint holds weights,
    averages and optimiser moments, so a run that was stopped goes on exactly where its last checkpoint
    stands.

    Args:
        model: the module to train.
        loss_of: ``loss_of(generator)`` draws a batch and returns the scalar loss.
        steps: number of optimiser steps.
        learning_rate: the peak, reached after ``warmup`` steps and decayed to 0 by a cosine.
        checkpoint: a ``.safetensors`` file, written every ``save_every`` steps.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        average: decay of the moving average of the weights; ramped up from 0 at the start.
        save_every: steps between checkpoints.
        seed: of every draw.

    Returns:
        ``{"steps", "minutes", "loss"}``: minutes over all runs, loss averaged over the last steps.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    averaged = [p.detach().clone() for p in parameters]
    state = _State(checkpoint, parameters, averaged)
    start, minutes, running = state.load(optimiser, steps)
    clock = time.monotonic()
    model.train()
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=checkpoint.stem, mininterval=5):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        torch.manual_seed(seed * 1_000_003 + step)
        scale = min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * scale
        loss = loss_of(generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        decay = min(average, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1.0 - decay)
        value = loss.item()
        running = value if step == 0 else 0.99 * running + 0.01 * value
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state.save(optimiser, step + 1, minutes + (time.monotonic() - clock) / 60, running)
    with torch.no_grad():
        for parameter, value_ in zip(parameters, averaged, strict=True):
            parameter.copy_(value_)
    model.eval()
    return {"steps": steps, "minutes": round(minutes + (time.monotonic() - clock) / 60, 1), "loss": running}


class _State:
    """The checkpoint file of one run."""

    def __init__(self, path: Path, parameters: list[nn.Parameter], averaged: list[torch.Tensor]) -> None:
        self.path, self.parameters, self.averaged = path, parameters, averaged

    def load(self, optimiser: torch.optim.Optimizer, steps: int) -> tuple[int, float, float]:
        if not self.path.exists():
            return 0, 0.0, 0.0
        with safe_open(self.path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            if record["step"] > steps:
                raise ValueError(f"checkpoint {self.path} has {record['step']} steps, more than steps={steps}")
            for k, (parameter, average) in enumerate(zip(self.parameters, self.averaged, strict=True)):
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"weight.{k}"))
                average.copy_(file.get_tensor(f"average.{k}"))
                optimiser.state[parameter] = {
                    "step": torch.tensor(float(record["step"])),
                    "exp_avg": file.get_tensor(f"moment1.{k}"),
                    "exp_avg_sq": file.get_tensor(f"moment2.{k}"),
                }
        return record["step"], record["minutes"], record["loss"]

    def save(self, optimiser: torch.optim.Optimizer, step: int, minutes: float, loss: float) -> None:
        tensors = {}
        for k, (parameter, average) in enumerate(zip(self.parameters, self.averaged, strict=True)):
            tensors[f"weight.{k}"] = parameter.detach().clone()
            tensors[f"average.{k}"] = average
            tensors[f"moment1.{k}"] = optimiser.state[parameter]["exp_avg"]
            tensors[f"moment2.{k}"] = optimiser.state[parameter]["exp_avg_sq"]
        record = json.dumps({"step": step, "minutes": minutes, "loss": loss})
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"record": record})
        os.replace(partial, self.path)
