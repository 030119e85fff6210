"""The network layer by layer, against its published structure; the published weights themselves are not at hand."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from fewstep.metrics import InceptionV3, convert_inception, feature_extractor, frechet_distance
from fewstep.metrics.inception import resize_as_tensorflow

# Of the public port: convolution -> outputs, inputs, kernel.
STEM = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
}


def block_a(inputs: int, pool: int) -> dict[str, tuple[int, ...]]:
    return {
        "branch1x1": (64, inputs, 1, 1),
        "branch5x5_1": (48, inputs, 1, 1),
        "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, inputs, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (pool, inputs, 1, 1),
    }


def block_c(c: int) -> dict[str, tuple[int, ...]]:
    return {
        "branch1x1": (192, 768, 1, 1),
        "branch7x7_1": (c, 768, 1, 1),
        "branch7x7_2": (c, c, 1, 7),
        "branch7x7_3": (192, c, 7, 1),
        "branch7x7dbl_1": (c, 768, 1, 1),
        "branch7x7dbl_2": (c, c, 7, 1),
        "branch7x7dbl_3": (c, c, 1, 7),
        "branch7x7dbl_4": (c, c, 7, 1),
        "branch7x7dbl_5": (192, c, 1, 7),
        "branch_pool": (192, 768, 1, 1),
    }


def block_e(inputs: int) -> dict[str, tuple[int, ...]]:
    return {
        "branch1x1": (320, inputs, 1, 1),
        "branch3x3_1": (384, inputs, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (448, inputs, 1, 1),
        "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, inputs, 1, 1),
    }


BLOCKS = {
    "Mixed_5b": block_a(192, 32),
    "Mixed_5c": block_a(256, 64),
    "Mixed_5d": block_a(288, 64),
    "Mixed_6a": {
        "branch3x3": (384, 288, 3, 3),
        "branch3x3dbl_1": (64, 288, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    },
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": {
        "branch3x3_1": (192, 768, 1, 1),
        "branch3x3_2": (320, 192, 3, 3),
        "branch7x7x3_1": (192, 768, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1),
        "branch7x7x3_4": (192, 192, 3, 3),
    },
    "Mixed_7b": block_e(1280),
    "Mixed_7c": block_e(2048),
}
OUTPUTS = {
    "Conv2d_1a_3x3": (32, 149),
    "Conv2d_2a_3x3": (32, 147),
    "Conv2d_2b_3x3": (64, 147),
    "Conv2d_3b_1x1": (80, 73),
    "Conv2d_4a_3x3": (192, 71),
    "Mixed_5b": (256, 35),
    "Mixed_5c": (288, 35),
    "Mixed_5d": (288, 35),
    "Mixed_6a": (768, 17),
    "Mixed_6b": (768, 17),
    "Mixed_6c": (768, 17),
    "Mixed_6d": (768, 17),
    "Mixed_6e": (768, 17),
    "Mixed_7a": (1280, 8),
    "Mixed_7b": (2048, 8),
    "Mixed_7c": (2048, 8),
}


@pytest.fixture(scope="module")
def weights() -> OrderedDict[str, torch.Tensor]:
    """Random ones under the public names, scaled so that signals keep their size."""
    generator = torch.Generator().manual_seed(0)
    found: OrderedDict[str, torch.Tensor] = OrderedDict()
    names = STEM | {f"{block}.{name}": shape for block, layers in BLOCKS.items() for name, shape in layers.items()}
    for name, shape in names.items():
        scale = (2.0 / (shape[1] * shape[2] * shape[3])) ** 0.5
        found[f"{name}.conv.weight"] = scale * torch.randn(shape, generator=generator)
        found[f"{name}.bn.weight"] = 0.8 + 0.4 * torch.rand(shape[0], generator=generator)
        found[f"{name}.bn.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
        found[f"{name}.bn.running_mean"] = 0.1 * torch.randn(shape[0], generator=generator)
        found[f"{name}.bn.running_var"] = 0.8 + 0.4 * torch.rand(shape[0], generator=generator)
    found["fc.weight"] = torch.randn(1008, 2048, generator=generator) / 2048**0.5
    found["fc.bias"] = torch.randn(1008, generator=generator)
    return found


@pytest.fixture(scope="module")
def path(weights: OrderedDict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the converter, from a .pth as old versions of torch wrote it."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save(weights, folder / "port.pth", _use_new_zipfile_serialization=False)
    digest = convert_inception(folder / "port.pth", folder / "inception.safetensors")
    assert digest == hashlib.sha256((folder / "port.pth").read_bytes()).hexdigest()
    assert sorted(p.name for p in folder.iterdir()) == ["inception.safetensors", "port.pth"]
    return folder / "inception.safetensors"


@pytest.fixture(scope="module")
def network(path: Path) -> InceptionV3:
    return InceptionV3.from_file(path)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (1, 3, 40, 50), generator=generator, dtype=torch.uint8)


Outputs = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def layers(network: InceptionV3) -> Outputs:
    """Input and output of every block and of the stem's convolutions, of one image of noise."""
    found: Outputs = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            found[name] = inputs[0], output

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in OUTPUTS]
    noise = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(2)) * 2.0 - 1.0
    with torch.no_grad():
        found["features"] = noise, network(noise)
    for handle in handles:
        handle.remove()
    return found


def convolution(weights: OrderedDict[str, torch.Tensor], name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """By the definition of batch normalisation; stride 1 keeps the size."""
    kernel = weights[f"{name}.conv.weight"]
    padding = (0, 0) if stride == 2 else (kernel.shape[2] // 2, kernel.shape[3] // 2)
    scale = weights[f"{name}.bn.weight"] / (weights[f"{name}.bn.running_var"] + 0.001).sqrt()
    shift = weights[f"{name}.bn.bias"] - weights[f"{name}.bn.running_mean"] * scale
    return (F.conv2d(x, kernel * scale.view(-1, 1, 1, 1), shift, stride, padding)).clamp(min=0.0)


def average(x: torch.Tensor) -> torch.Tensor:
    """Of 3 x 3 pixels, and at the edge of those that exist."""
    ones = torch.ones(1, 1, *x.shape[2:])
    kernel = torch.ones(1, 1, 3, 3)
    sums = F.conv2d(x.transpose(0, 1), kernel, padding=1).transpose(0, 1)
    return sums / F.conv2d(ones, kernel, padding=1)


def largest(x: torch.Tensor) -> torch.Tensor:
    padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    return padded.unfold(2, 3, 1).unfold(3, 3, 1).amax((4, 5))


def halved(x: torch.Tensor) -> torch.Tensor:
    return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))


def test_names_and_shapes_are_those_of_the_public_port(weights: OrderedDict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    found = {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert found == {name: tuple(value.shape) for name, value in weights.items()}


def test_number_of_parameters_is_that_of_inception_v3() -> None:
    """Published: 27,161,264 with 1000 classes, of which 3,326,696 in the auxiliary classifier, which is not here."""
    with torch.device("meta"):
        parameters = sum(value.numel() for value in InceptionV3().parameters())
    assert parameters == 27_161_264 - 3_326_696 + 8 * (2048 + 1)


@pytest.mark.parametrize("name", OUTPUTS)
def test_layers_have_their_published_shapes(layers: Outputs, name: str) -> None:
    channels, edge = OUTPUTS[name]
    assert layers[name][1].shape == (1, channels, edge, edge)


def test_layers_follow_each_other(layers: Outputs) -> None:
    names = list(OUTPUTS)
    for before, after in itertools.pairwise(names):
        pooled = after in ("Conv2d_3b_1x1", "Mixed_5b")
        expected = halved(layers[before][1]) if pooled else layers[before][1]
        assert torch.equal(layers[after][0], expected), after
    torch.testing.assert_close(layers["features"][1], layers["Mixed_7c"][1].mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_stem_convolves_and_normalises(weights: OrderedDict[str, torch.Tensor], layers: Outputs) -> None:
    for name, stride in (("Conv2d_1a_3x3", 2), ("Conv2d_2b_3x3", 1), ("Conv2d_3b_1x1", 1)):
        x, found = layers[name]
        torch.testing.assert_close(found, convolution(weights, name, x, stride), rtol=1e-4, atol=1e-5)
    for name in ("Conv2d_2a_3x3", "Conv2d_4a_3x3"):  # without padding
        x, found = layers[name]
        expected = convolution(weights, name, x)[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_their_branches_in_order(
    weights: OrderedDict[str, torch.Tensor], layers: Outputs, block: str
) -> None:
    x, found = layers[block]

    def chain(x: torch.Tensor, *names: str, last_stride: int = 1) -> torch.Tensor:
        for name in names:
            x = convolution(weights, f"{block}.{name}", x, last_stride if name == names[-1] else 1)
        return x

    if block.startswith("Mixed_5"):
        branches = [
            chain(x, "branch1x1"),
            chain(x, "branch5x5_1", "branch5x5_2"),
            chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            chain(average(x), "branch_pool"),
        ]
    elif block == "Mixed_6a":
        branches = [
            chain(x, "branch3x3", last_stride=2),
            chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3", last_stride=2),
            halved(x),
        ]
    elif block.startswith("Mixed_6"):
        branches = [
            chain(x, "branch1x1"),
            chain(x, *(f"branch7x7_{k}" for k in (1, 2, 3))),
            chain(x, *(f"branch7x7dbl_{k}" for k in (1, 2, 3, 4, 5))),
            chain(average(x), "branch_pool"),
        ]
    elif block == "Mixed_7a":
        branches = [
            chain(x, "branch3x3_1", "branch3x3_2", last_stride=2),
            chain(x, *(f"branch7x7x3_{k}" for k in (1, 2, 3, 4)), last_stride=2),
            halved(x),
        ]
    else:
        wide, double = chain(x, "branch3x3_1"), chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        pooled = average(x) if block == "Mixed_7b" else largest(x)
        branches = [
            chain(x, "branch1x1"),
            chain(wide, "branch3x3_2a"),
            chain(wide, "branch3x3_2b"),
            chain(double, "branch3x3dbl_3a"),
            chain(double, "branch3x3dbl_3b"),
            chain(pooled, "branch_pool"),
        ]
    torch.testing.assert_close(found, torch.cat(branches, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(32, 32), (40, 500), (299, 299), (1, 7)])
def test_resizing_puts_pixels_where_tensorflow_1_does(shape: tuple[int, int]) -> None:
    """Pixel k of the result shows the place k * size / 299, and what lies beyond the last pixel is that pixel."""
    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    places = [torch.arange(299, dtype=torch.float64) * edge / 299 for edge in shape]
    # The sampler's coordinates run from -1 to 1 through the pixels' middles.
    y, x_axis = (2.0 * p / max(edge - 1, 1) - (1.0 if edge > 1 else 0.0) for p, edge in zip(places, shape, strict=True))
    grid = torch.stack([x_axis.expand(299, 299), y[:, None].expand(299, 299)], -1).expand(2, -1, -1, -1)
    expected = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)
    torch.testing.assert_close(resize_as_tensorflow(x, 299), expected, rtol=0, atol=1e-4)
    if shape == (299, 299):
        assert torch.equal(resize_as_tensorflow(x, 299), x)


def test_extractor_prepares_images_and_leaves_the_bias_out(
    path: Path, network: InceptionV3, weights: OrderedDict[str, torch.Tensor], images: torch.Tensor
) -> None:
    extractor = feature_extractor("inception", path)
    assert (extractor.name, extractor.size, extractor.classes) == ("inception", 2048, 1008)
    features, logits = extractor.features_and_logits(images)
    with torch.no_grad():
        expected = network((resize_as_tensorflow(images.float(), 299) - 128.0) / 128.0)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, expected @ weights["fc.weight"].T, rtol=1e-4, atol=1e-5)
    assert len(extractor.fingerprint) == 64
    # Torchmetrics takes it as it is.
    metric = FrechetInceptionDistance(feature=extractor)
    metric.update(images, real=True)
    assert metric.inception is extractor
    torch.testing.assert_close(metric.real_features_sum, features.double().sum(0), rtol=1e-5, atol=1e-5)


def test_distance_is_torchmetrics_of_the_same_network(path: Path) -> None:
    """Of its first layer: all of them would take long here."""
    stem = InceptionV3.from_file(path).Conv2d_1a_3x3

    def short(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return stem(images.float().expand(-1, 3, -1, -1) / 128.0 - 1.0).mean((2, 3))

    module = nn.Module()
    module.forward = short  # type: ignore[method-assign, assignment]
    module.num_features = 32  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=module)
    generator = torch.Generator().manual_seed(4)
    moments = []
    for real in (True, False):
        noise = torch.randint(256 if real else 200, (90, 1, 16, 16), generator=generator, dtype=torch.uint8)
        metric.update(noise, real=real)
        features = short(noise).double()
        moments += [features.mean(0), torch.cov(features.T)]
    metric.orig_dtype = torch.float64
    assert frechet_distance(*moments) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_converted_file_is_complete_and_says_where_it_is_from(path: Path, weights: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(weights)
        for name in ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var", "fc.bias"):
            assert torch.equal(file.get_tensor(name), weights[name])
        assert len(file.metadata()["source"]) == 64


class Trap:
    """Executes code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("the converter executed what it read",)


def test_refusals(weights: OrderedDict[str, torch.Tensor], tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    zeros = {name: torch.zeros(()).expand(value.shape) for name, value in weights.items()}  # small files
    torch.save({"fc.weight": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    few = {name: weights[name] for name in ("Conv2d_1a_3x3.conv.weight", "fc.bias")}
    torch.save(few, tmp_path / "few.pth")
    torch.save(zeros | {"fc.weight": torch.zeros(()).expand(1000, 2048)}, tmp_path / "imagenet.pth")
    torch.save(zeros | {"AuxLogits.fc.bias": torch.zeros(1000)}, tmp_path / "auxiliary.pth")
    for name, said in {
        "missing": "is not readable as weights of PyTorch",
        "trap": "is not readable as weights of PyTorch",
        "text": "is not readable as weights of PyTorch",
        "list": "holds no state dict",
        "few": "Conv2d_1a_3x3.bn.weight is missing, expected",
        "imagenet": r"fc.weight is \(1000, 2048\), expected \(1008, 2048\)",
        "auxiliary": r"AuxLogits.fc.bias is \(1000,\), expected nothing",
    }.items():
        with pytest.raises(ValueError, match=said):
            convert_inception(tmp_path / f"{name}.pth", target)
    assert not target.exists()
    with pytest.raises(ValueError, match="not readable as safetensors"):
        InceptionV3.from_file(tmp_path / "text.pth")
    with pytest.raises(ValueError, match="not readable as safetensors"):
        InceptionV3.from_file(target)
    save_file(few, target)
    with pytest.raises(ValueError, match="holds another network"):
        feature_extractor("inception", target)
