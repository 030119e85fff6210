"""A small classifier of noised samples: how rare what will come of them is."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from fewstep.samplers.files import replaced

BUNDLED_MINORITY = Path(__file__).parent / "digits"
"""Folder of the bundled classifier."""

_FREQUENCIES = 8


class MinorityClassifier(nn.Module):
    """A convolutional classifier of noised samples that serves every noise schedule.

    It sees samples scaled to unit variance and knows the noise by the angle ``atan(sigma / alpha)``. Logits are
    proportional to ``alpha / sqrt(alpha^2 + sigma^2)`` beside a bias, as the gradient of a true posterior is: however
    noisy the sample, guidance divides nothing by a small number.

    Args:
        channels: of the samples.
        size: their height and width, a multiple of 2.
        classes: number of classes.
        width: channels of the first half of the layers.
    """

    def __init__(self, channels: int = 4, size: int = 8, classes: int = 10, width: int = 48) -> None:
        super().__init__()
        self.config = {"channels": channels, "size": size, "classes": classes, "width": width}
        self.noise = nn.Sequential(nn.Linear(2 * _FREQUENCIES, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.stem = nn.Conv2d(channels, width, 3, 1, 1)
        self.first = _Block(width)
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.second = _Block(2 * width)
        self.hidden = nn.Linear(2 * width * (size // 2) ** 2, 128)
        self.head = nn.Linear(128, classes)
        self.bias = nn.Linear(64, classes)

    def forward(self, sample: torch.Tensor, alpha: float | torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Logits of noised samples.

        Args:
            sample: ``alpha * clean + sigma * noise``, ``(batch, channels, size, size)``.
            alpha: signal coefficient, a number or ``(batch,)``.
            sigma: noise coefficient, likewise.

        Returns:
            ``(batch, classes)``, in the dtype of the weights.

        Raises:
            ValueError: samples of another shape.
        """
        expected = (self.config["channels"], self.config["size"], self.config["size"])
        if tuple(sample.shape[1:]) != expected:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; the classifier takes (batch, "
                f"{', '.join(map(str, expected))}), what its model's scheduler steps"
            )
        like = self.head.weight
        a, s = (torch.as_tensor(v, dtype=like.dtype, device=like.device).expand(len(sample)) for v in (alpha, sigma))
        size = torch.hypot(a, s)
        angles = torch.atan2(s, a)[:, None] * torch.arange(1, 1 + _FREQUENCIES, device=like.device)
        noise = self.noise(torch.cat([angles.cos(), angles.sin()], 1))
        x = self.stem(sample.to(like.dtype) / size.view(-1, 1, 1, 1))
        x = self.second(self.down(self.first(x, noise)), noise)
        x = F.silu(self.hidden(F.silu(x).flatten(1)))
        return self.head(x) * (a / size)[:, None] + self.bias(noise)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into a folder; rounds the weights to half precision."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in self.state_dict().items()}
        self.load_state_dict(weights)
        files = {"model.safetensors": save(weights), "config.json": (json.dumps(self.config, indent=2) + "\n").encode()}
        for name, content in files.items():
            with replaced(path / name) as partial:
                partial.write_bytes(content)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> MinorityClassifier:
        """Loads a classifier in evaluation mode and single precision.

        Args:
            path: a folder written by ``save_pretrained``.

        Raises:
            ValueError: the folder does not hold one.
        """
        path = Path(path)
        missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
        if missing:
            raise ValueError(f"path {path} holds no classifier: {' and '.join(missing)} missing")
        try:
            model = cls(**json.loads((path / "config.json").read_text()))
            model.load_state_dict(load_file(path / "model.safetensors"))
        except (TypeError, RuntimeError, json.JSONDecodeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"path {path} holds another kind of model than MinorityClassifier: {reason}") from error
        return model.eval().requires_grad_(False)

    @classmethod
    def bundled(cls) -> MinorityClassifier:
        """The one of the bundled digit models' latents: ten classes from common (0) to rare (9) of each digit."""
        return cls.from_pretrained(BUNDLED_MINORITY)


class _Block(nn.Module):
    """Two convolutions beside a shortcut; the noise scales and shifts between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(8, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(2))
        self.modulation = nn.Linear(64, 2 * channels)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(noise)[:, :, None, None].chunk(2, dim=1)
        hidden = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1.0 + scale) + shift
        return x + self.conv2(F.silu(hidden))
