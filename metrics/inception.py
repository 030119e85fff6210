"""The variant of InceptionV3 that the Frechet Inception Distance is made with."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

INCEPTION_SIZE = 299
"""Height and width of the images that the network takes."""


class _Conv(NamedTuple):
    """A convolution with batch normalisation; those with stride 1 keep the size."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1


def _conv(name: str, channels: int, kernel: int | tuple[int, int] = 1, stride: int = 1) -> _Conv:
    return _Conv(name, channels, kernel if isinstance(kernel, tuple) else (kernel, kernel), stride)


_Branch = Sequence["_Conv | tuple[_Conv, _Conv] | str"]
"""A chain; a pair stands side by side, a string is a pooling without weights."""


def _five(pool: int) -> Sequence[_Branch]:
    return (
        (_conv("branch1x1", 64),),
        (_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)),
        (_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)),
        ("average", _conv("branch_pool", pool)),
    )


def _six(middle: int) -> Sequence[_Branch]:
    wide, high = (1, 7), (7, 1)
    return (
        (_conv("branch1x1", 192),),
        (
            _conv("branch7x7_1", middle),
            _conv("branch7x7_2", middle, wide),
            _conv("branch7x7_3", 192, high),
        ),
        (
            _conv("branch7x7dbl_1", middle),
            _conv("branch7x7dbl_2", middle, high),
            _conv("branch7x7dbl_3", middle, wide),
            _conv("branch7x7dbl_4", middle, high),
            _conv("branch7x7dbl_5", 192, wide),
        ),
        ("average", _conv("branch_pool", 192)),
    )


def _seven(pooling: str) -> Sequence[_Branch]:
    wide, high = (1, 3), (3, 1)
    return (
        (_conv("branch1x1", 320),),
        (
            _conv("branch3x3_1", 384),
            (_conv("branch3x3_2a", 384, wide), _conv("branch3x3_2b", 384, high)),
        ),
        (
            _conv("branch3x3dbl_1", 448),
            _conv("branch3x3dbl_2", 384, 3),
            (_conv("branch3x3dbl_3a", 384, wide), _conv("branch3x3dbl_3b", 384, high)),
        ),
        (pooling, _conv("branch_pool", 192)),
    )


_BLOCKS: Mapping[str, Sequence[_Branch]] = {
    "Mixed_5b": _five(32),
    "Mixed_5c": _five(64),
    "Mixed_5d": _five(64),
    "Mixed_6a": (
        (_conv("branch3x3", 384, 3, 2),),
        (_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3, 2)),
        ("reduce",),
    ),
    "Mixed_6b": _six(128),
    "Mixed_6c": _six(160),
    "Mixed_6d": _six(160),
    "Mixed_6e": _six(192),
    "Mixed_7a": (
        (_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, 2)),
        (
            _conv("branch7x7x3_1", 192),
            _conv("branch7x7x3_2", 192, (1, 7)),
            _conv("branch7x7x3_3", 192, (7, 1)),
            _conv("branch7x7x3_4", 192, 3, 2),
        ),
        ("reduce",),
    ),
    "Mixed_7b": _seven("average"),
    # The graph of 2015-12-05 takes the maximum here, though the paper has averages throughout.
    "Mixed_7c": _seven("maximum"),
}


class _Convolution(nn.Module):
    def __init__(self, inputs: int, channels: int, kernel: tuple[int, int], stride: int, same: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches side by side; ``channels`` is what they have together."""

    def __init__(self, inputs: int, branches: Sequence[_Branch]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = 0
        for branch in branches:
            width = inputs
            for step in branch:
                if isinstance(step, str):
                    continue
                convolutions = [step] if isinstance(step, _Conv) else list(step)
                for one in convolutions:
                    layer = _Convolution(width, one.channels, one.kernel, one.stride, same=one.stride == 1)
                    self.add_module(one.name, layer)
                width = sum(one.channels for one in convolutions)
            self.channels += width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._branch(x, branch) for branch in self.branches], 1)

    def _branch(self, x: torch.Tensor, branch: _Branch) -> torch.Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _pooled(x, step)
            elif isinstance(step, _Conv):
                x = self.get_submodule(step.name)(x)
            else:
                x = torch.cat([self.get_submodule(one.name)(x) for one in step], 1)
        return x


def _pooled(x: torch.Tensor, pooling: str) -> torch.Tensor:
    if pooling == "average":
        # TensorFlow's average does not count the padding.
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    if pooling == "maximum":
        return F.max_pool2d(x, 3, 1, 1)
    return F.max_pool2d(x, 3, 2)


class InceptionV3(nn.Module):
    """InceptionV3 (arXiv 1512.00567) as in TensorFlow's graph of 2015-12-05, which the FID of arXiv 1706.08500 uses.

    It differs from other InceptionV3: averages do not count padding, the last block takes maxima, there are 1008
    classes and no auxiliary classifier. The weights have the names of the public PyTorch port of that graph,
    ``pt_inception-2015-12-05-6726825d.pth``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, (3, 3), 2, same=False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, (3, 3), 1, same=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, (3, 3), 1, same=True)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, (1, 1), 1, same=False)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, (3, 3), 1, same=False)
        width = 192
        for name, branches in _BLOCKS.items():
            block = _Block(width, branches)
            self.add_module(name, block)
            width = block.channels
        self.fc = nn.Linear(width, 1008)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features ``(B, 2048)``: the averages over the image of the last block.

        Args:
            images: ``(B, 3, 299, 299)`` in [-1, 1].
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_pooled(x, "reduce")))
        x = _pooled(x, "reduce")
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, 1008)`` of features ``(B, 2048)`` without the bias, as the inception score takes them."""
        return F.linear(features, self.fc.weight)

    @classmethod
    def from_file(cls, path: str | Path) -> InceptionV3:
        """Loads the network in evaluation mode.

        Args:
            path: a file of ``convert_inception``.

        Raises:
            ValueError: the file is not there, is no safetensors file, or holds another network.
        """
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            hint = "convert_inception makes one of the public .pth"
            raise ValueError(f"weights {path} are not readable as safetensors ({error}); {hint}") from None
        weights = _checked(weights, path)
        with torch.device("meta"):
            network = cls()
        for name, value in network.state_dict().items():
            if _counts_batches(name):
                weights[name] = torch.zeros_like(value, device="cpu")
        network.load_state_dict(weights, assign=True)
        return network.eval()


def convert_inception(source: str | Path, target: str | Path) -> str:
    """Writes the weights of the public ``pt_inception-2015-12-05-6726825d.pth`` as safetensors.

    Nothing in the file is executed: it is read with ``weights_only=True``.

    Args:
        source: the .pth file.
        target: the safetensors file.

    Returns:
        SHA-256 of the source; that of the public file begins with 6726825d.

    Raises:
        ValueError: the source is not readable, or holds another network.
    """
    source, target = Path(source), Path(target)
    try:
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"source {source} is not readable as weights of PyTorch: {reason}") from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"source {source} holds no state dict; give pt_inception-2015-12-05-6726825d.pth")
    partial = target.with_name(target.name + ".partial")
    save_file(_checked(weights, source), partial, metadata={"source": digest})
    partial.replace(target)
    return digest


def resize_as_tensorflow(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear interpolation to ``size`` x ``size`` as TensorFlow 1 had it: pixel 0 lands on pixel 0, no antialiasing.

    Args:
        images: ``(B, C, H, W)``, floating point.
        size: height and width of the result.
    """
    for dimension in (2, 3):
        edge = images.shape[dimension]
        at = torch.arange(size, device=images.device, dtype=torch.float32) * (edge / size)
        low = at.long().clamp(max=edge - 1)
        share = (at - low).to(images.dtype).view((-1, 1) if dimension == 2 else (-1,))
        below, above = (images.index_select(dimension, i) for i in (low, (low + 1).clamp(max=edge - 1)))
        images = below + (above - below) * share
    return images


def _counts_batches(name: str) -> bool:
    return name.endswith(".num_batches_tracked")


def _checked(weights: Mapping[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """What evaluation needs of a state dict, in float32."""
    with torch.device("meta"):
        expected = {n: tuple(v.shape) for n, v in InceptionV3().state_dict().items() if not _counts_batches(n)}
    found = {n: tuple(v.shape) for n, v in weights.items() if not _counts_batches(n)}
    if found != expected:
        differing = next(n for n in (*expected, *found) if found.get(n) != expected.get(n))
        raise ValueError(
            f"{path} holds another network than the FID's InceptionV3: {differing} is "
            f"{found.get(differing, 'missing')}, expected {expected.get(differing, 'nothing')}; "
            "give the weights of pt_inception-2015-12-05-6726825d.pth"
        )
    return {name: weights[name].detach().float().contiguous() for name in expected}
