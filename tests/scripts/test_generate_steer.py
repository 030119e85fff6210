"""``fewstep generate --steer``: every method on the bundled model, what it reaches, and what its record says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

from fewstep.metrics import DigitsClassifier
from fewstep.scripts.generation.reward_plot import reward_curve
from fewstep.scripts.generation.steering import METHODS, Steering
from model_folders import invoke, pictures

CALLS: dict[str, tuple[tuple[object, ...], int]] = {
    "best-of-n": (("rounds=2",), 2 * 4 * 3),
    "zero-order": (("rounds=2", "similarity=0.9"), 2 * 4 * 3),
    "paths": (("start=0.3",), 4 * (1 + 2 + 2)),  # to the first node, from there back by one and on by two, twice
    "fk": (("scale=2", "potential=max"), 4 * 3),
    "fkc": (("exponent=1.1", "threshold=1"), 4 * 4),  # one call more, which scales the noise
    "reward-gradient": (("gradient_scale=0.5",), 4 * 3),
    "svdd": (("temperature=0",), 4 * 3),
    "dts": (("selection=uniform",), 4 * 3),
    "dts-star": (("calls=10", "scale=inf", "parallel=2"), 10),
    "minority": (("scale=2",), 3),
    "self-minority": (("distance=absolute",), 3 + 2 * 3),
}
"""Options, and network calls an image at 3 steps with 4 particles, by the definition of the method."""


def generate(*arguments: object) -> str:
    result = invoke("generate", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def drawn(folder: Path, number: int) -> torch.Tensor:
    """The images in [0, 1], from their files."""
    images = [np.asarray(Image.open(folder / f"{i:05d}.png").convert("L")) for i in range(number)]
    return torch.from_numpy(np.stack(images)).float()[:, None] / 255


def log_probabilities(folder: Path, number: int, *labels: int) -> torch.Tensor:
    """Of the images in the files, by the classifier."""
    with torch.no_grad():
        logits = DigitsClassifier.bundled()(2 * drawn(folder, number) - 1)
    return torch.log_softmax(logits, 1)[:, list(labels)].logsumexp(1)


def counted_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the network really sees from now on."""
    seen: list[int] = []
    forward = DiTTransformer2DModel.forward

    def counting(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(hidden_states))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(DiTTransformer2DModel, "forward", counting)
    return seen


# ---------------------------------------------------------------- every method


def test_every_method_is_tried_here() -> None:
    assert CALLS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_method(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted_rows(monkeypatch)
    words, calls = CALLS[method]
    particles = ("--particles", 4) if METHODS[method].particles else ()
    told = generate(
        "--steer", method, "--reward", "class:8", *particles, "--steps", 3, "--number", 2, "--output", tmp_path,
        *(part for word in words for part in ("--steer-option", word)),
    )  # fmt: skip
    record = record_of(tmp_path)
    assert [image["network_calls"] for image in record["images"]] == [calls, calls]
    assert sum(seen) == 2 * calls
    rewards = [image["reward"] for image in record["images"]]
    assert told == f"2 images in {tmp_path}; mean reward {sum(rewards) / 2:.4g}; {2 * calls} network calls\n"
    # The reward in the record is that of the image in the file, up to its 8 bits.
    torch.testing.assert_close(torch.tensor(rewards), log_probabilities(tmp_path, 2, 8), rtol=0.05, atol=0.05)
    steering = record["run"]["steering"]
    assert (steering["method"], steering["rewards"]) == (method, ["class:8"])
    assert steering["options"].keys() == METHODS[method].options.keys()
    assert {word.partition("=")[0] for word in map(str, words)} <= {
        name for name, value in steering["options"].items() if value != METHODS[method].options[name]
    }
    assert [image["class"] for image in record["images"]] == [1000, 1000]  # the model without class
    assert record["run"]["guidance_scale"] == 1.0
    sizes = [image.get("effective_sample_sizes") for image in record["images"]]
    if method in ("fk", "fkc", "reward-gradient"):
        assert all(len(one) >= 3 and 1.0 <= min(one) <= max(one) <= 4.0 + 1e-9 for one in sizes)
        assert min(min(one) for one in sizes) < 3.9
    else:
        assert sizes == [None, None]


@pytest.fixture(scope="module")
def unsteered(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Log-probabilities of class 8 and of the even digits, of 8 images without class of the same sampler."""
    folder = tmp_path_factory.mktemp("unsteered")
    generate("--sampler", "sde-dpm++", "--steps", 5, "--classes", "none", "--number", 8, "--output", folder)
    return torch.stack([log_probabilities(folder, 8, 8), log_probabilities(folder, 8, 0, 2, 4, 6, 8)])


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("best-of-n", ()),
        ("zero-order", ()),
        ("paths", ()),
        ("fk", ("scale=2",)),
        ("fkc", ("scale=2",)),
        ("reward-gradient", ("scale=2",)),
        ("svdd", ()),
        ("dts", ()),
        ("dts-star", ()),
    ],
)
def test_reward_rises(method: str, words: tuple[str, ...], unsteered: torch.Tensor, tmp_path: Path) -> None:
    """By half of what there is to gain: the mean log-probability of an eight without steering is about -6."""
    generate(
        "--steer", method, "--reward", "class:8", "--particles", 8, "--steps", 5, "--number", 8, "--output", tmp_path,
        *(part for word in words for part in ("--steer-option", word)),
    )  # fmt: skip
    assert unsteered[0].mean() < -4.0
    assert log_probabilities(tmp_path, 8, 8).mean() > 0.5 * unsteered[0].mean()


def test_even_digits(unsteered: torch.Tensor, tmp_path: Path) -> None:
    generate(
        "--steer", "svdd", "--reward", "class:0+2+4+6+8", "--particles", 6, "--steps", 5, "--number", 8,
        "--output", tmp_path,
    )  # fmt: skip
    assert log_probabilities(tmp_path, 8, 0, 2, 4, 6, 8).mean() > 0.2 * unsteered[1].mean()
    assert len(set(files(tmp_path).values())) > 8  # no two images are one


@pytest.mark.parametrize("method", ["minority", "self-minority"])
def test_guidance_of_no_strength_gives_the_unsteered_image(method: str, tmp_path: Path) -> None:
    common = ("--classes", "3,5", "--steps", 3, "--guidance-scale", 2)
    generate(*common, "--output", tmp_path / "without")
    told = generate(*common, "--steer", method, "--steer-option", "scale=0", "--output", tmp_path / "with")
    assert pictures(tmp_path / "with") == pictures(tmp_path / "without")
    assert told == f"2 images in {tmp_path / 'with'}; 6 network calls\n"
    assert "reward" not in record_of(tmp_path / "with")["images"][0]
    generate(*common, "--steer", method, "--output", tmp_path / "guided")
    assert pictures(tmp_path / "guided") != pictures(tmp_path / "without")


def test_guidance_is_corrected_and_classes_stay(tmp_path: Path) -> None:
    """Without reward, the particles of ``fkc`` weigh the two branches of classifier-free guidance."""
    common = ("--steer", "fkc", "--steps", 6, "--classes", "2,7", "--guidance-scale", 3, "--particles", 6)
    generate(*common, "--output", tmp_path / "guided")
    record = record_of(tmp_path / "guided")
    assert min(min(image["effective_sample_sizes"]) for image in record["images"]) < 5.5
    assert [image["network_calls"] for image in record["images"]] == [36, 36]  # both branches are one
    for i, label in enumerate((2, 7)):
        assert log_probabilities(tmp_path / "guided", 2, label)[i] > -1.0
    assert record["cells"][0]["sampler"] == record["run"]["samplers"][0] == "feynman-kac"


def test_best_and_drawn(tmp_path: Path) -> None:
    """``pick=best`` takes the best particle of the population that ``pick=draw`` takes any of."""
    common = ("--steer", "fk", "--reward", "class:8", "--steer-option", "scale=0.2", "--steps", 3, "--number", 4)
    for pick in ("draw", "best"):
        generate(*common, "--steer-option", f"pick={pick}", "--output", tmp_path / pick)
    drawn_ones, best = (
        torch.tensor([image["reward"] for image in record_of(tmp_path / pick)["images"]]) for pick in ("draw", "best")
    )
    assert (best >= drawn_ones - 1e-5).all()
    assert (best > drawn_ones + 0.1).any()


def test_weighted_rewards_add_up(tmp_path: Path) -> None:
    generate(
        "--steer", "best-of-n", "--reward", "class:8", "--reward", "-20*brightness", "--particles", 2, "--steps", 3,
        "--number", 2, "--output", tmp_path,
    )  # fmt: skip
    expected = log_probabilities(tmp_path, 2, 8) - 20 * drawn(tmp_path, 2).mean((1, 2, 3))
    found = torch.tensor([image["reward"] for image in record_of(tmp_path)["images"]])
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("method", ["best-of-n", "zero-order", "paths"])
def test_rewards_combined_by_ranks(method: str, tmp_path: Path) -> None:
    """A reward a million times as large does not drown the other, as it does in the sum."""
    common = (
        "--steer", method, "--reward", "1e6*brightness", "--reward", "class:8", "--particles", 8, "--steps", 3,
        "--number", 3,
    )  # fmt: skip
    for combine in ("sum", "ranks"):
        generate(*common, "--steer-option", f"combine={combine}", "--output", tmp_path / combine)
    lit = {name: drawn(tmp_path / name, 3).mean() for name in ("sum", "ranks")}
    eight = {name: log_probabilities(tmp_path / name, 3, 8).mean() for name in ("sum", "ranks")}
    assert lit["sum"] > lit["ranks"]
    assert eight["ranks"] > eight["sum"]
    for image in record_of(tmp_path / "ranks")["images"]:  # both count in the record
        assert image["reward"] > 1e4


@pytest.mark.parametrize("sign", [1, -1])
def test_brightness_and_its_opposite(sign: int, tmp_path: Path) -> None:
    common = ("--classes", "1,4", "--steps", 2)
    generate(*common, "--output", tmp_path / "without")
    generate(
        *common, "--steer", "best-of-n", "--particles", 6, "--reward", f"{sign}*brightness", "--output", tmp_path / "b"
    )
    lit, plain = (drawn(tmp_path / name, 2).mean((1, 2, 3)) for name in ("b", "without"))
    assert (sign * (lit - plain) > 0).all()


# ---------------------------------------------------------------- the same bytes again


@pytest.mark.parametrize("method", ["best-of-n", "fk", "fkc", "svdd", "dts", "self-minority"])
def test_batch_size_and_record_change_no_byte(method: str, tmp_path: Path) -> None:
    particles = ("--particles", 3) if METHODS[method].particles else ()
    common = ("--steer", method, "--reward", "class:8", *particles, "--steps", 3, "--number", 2)
    generate(*common, "--batch-size", 1, "--output", tmp_path / "one")
    generate(*common, "--batch-size", 7, "--output", tmp_path / "seven")
    generate("--record", tmp_path / "one" / "record.json", "--output", tmp_path / "again")
    assert set(files(tmp_path / "one")) == {
        "00000.json", "00000.png", "00001.json", "00001.png", "grid.png", "record.json"
    }  # fmt: skip
    assert files(tmp_path / "one") == files(tmp_path / "seven") == files(tmp_path / "again")


@pytest.mark.parametrize("method", ["zero-order", "paths", "reward-gradient", "dts-star", "minority"])
def test_image_of_a_seed_is_the_same_in_every_run(method: str, tmp_path: Path) -> None:
    particles = ("--particles", 4) if METHODS[method].particles else ()
    common = ("--steer", method, "--reward", "class:8", *particles, "--steps", 3)
    generate(*common, "--number", 2, "--seed", 10, "--output", tmp_path / "two")
    generate(*common, "--number", 1, "--seed", 11, "--output", tmp_path / "second")
    two, second = files(tmp_path / "two"), files(tmp_path / "second")
    assert (two["00001.png"], two["00001.json"]) == (second["00000.png"], second["00000.json"])
    assert two["00000.png"] != two["00001.png"]


@pytest.mark.parametrize("stopped_at", ["00001.json", "00001.png", "grid.png"])
def test_interrupted_run_goes_on(stopped_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def limited(source: Path, target: Path) -> None:
        if target.name == stopped_at:
            raise KeyboardInterrupt
        replace(source, target)

    common = ("--steer", "svdd", "--reward", "class:8", "--particles", 2, "--steps", 2, "--number", 3, "--output")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", limited)
        assert invoke("generate", *common, tmp_path / "stopped").exit_code != 0
    before = files(tmp_path / "stopped")
    assert json.loads(before["record.json"])["status"] == "running"
    finished = 3 if stopped_at == "grid.png" else 1
    assert len([name for name in before if name.endswith(".png")]) == finished
    seen = counted_rows(monkeypatch)
    told = generate(*common, tmp_path / "stopped")
    assert sum(seen) == (3 - finished) * 4
    assert f"3 images in {tmp_path / 'stopped'}, {finished} of them from before; mean reward" in told
    generate(*common, tmp_path / "whole")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert generate(*common, tmp_path / "whole").endswith("; 12 network calls\n")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_record_of_an_unsteered_run_is_what_it_was(tmp_path: Path) -> None:
    generate("--steps", 1, "--number", 1, "--output", tmp_path)
    assert "steering" not in record_of(tmp_path)["run"]
    assert record_of(tmp_path)["images"] == [{"file": "00000.png", "seed": 0, "class": 0}]


# ---------------------------------------------------------------- what the user sees


def test_help_lists_methods_options_and_rewards() -> None:
    told = invoke("generate", "--help").stdout
    for name, method in METHODS.items():
        assert f"  {name} " in told
        for option in method.options:
            assert f"{option}=" in told
    for name in ("class:8", "clip:TEXT", "compressibility:png", "brightness"):
        assert name in told
    assert "fewstep generate --steer svdd --reward class:8 --particles 8" in told
    assert all(len(line) <= 80 for line in told.splitlines())


@pytest.mark.parametrize(("method", "suffix"), [("dts-star", "png"), ("svdd", "svg")])
def test_plot(method: str, suffix: str, tmp_path: Path) -> None:
    out, plot = tmp_path / "out", tmp_path / f"reward.{suffix}"
    common = ("--steer", method, "--reward", "class:8", "--particles", 3, "--steps", 3, "--number", 2)
    generate(*common, "--output", out)
    before = files(out)
    generate("--record", out / "record.json", "--output", out, "--plot", plot)  # a finished run is only drawn
    assert files(out) == before
    if suffix == "png":
        with Image.open(plot) as image:
            assert image.size[0] > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    else:
        assert "</svg>" in plot.read_text()


def test_history_tells_reward_against_calls(tmp_path: Path) -> None:
    for method, calls in (
        ("zero-order", [6, 12, 18]),
        ("svdd", [2, 4, 6, 6]),  # predictions of every call, and the results
        ("dts", [3, 6]),
    ):
        out = tmp_path / method
        words = ("--steer-option", "rounds=3") if method == "zero-order" else ()
        generate(
            "--steer", method, "--reward", "class:8", "--particles", 2, "--steps", 3, "--number", 1, *words,
            "--output", out,
        )  # fmt: skip
        account = json.loads((out / "00000.json").read_text())
        steering = Steering.from_json(record_of(out)["run"]["steering"])
        found, rewards = reward_curve(steering, account["history"])
        assert found.tolist() == calls
        if METHODS[method].finds:
            assert (np.diff(rewards) >= 0).all()
        if method != "dts":  # which draws from what it found
            assert rewards[-1] == pytest.approx(account["reward"], abs=0.2 if method == "svdd" else 1e-4)
