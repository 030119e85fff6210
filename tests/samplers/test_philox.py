"""Philox against the published answers, and the noise made of it."""

from __future__ import annotations

import pytest
import torch

from fewstep.samplers.noise import PhiloxStreams
from fewstep.samplers.philox import philox, philox_normal


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    words = [[torch.tensor([int(word, 16)]) for word in text.split()] for text in (counter, key)]
    assert [f"{int(word):08x}" for word in philox(*words)] == expected.split()


def test_numbers_are_standard_normal_and_uncorrelated() -> None:
    noise = philox_normal(torch.tensor([0, 1]), 0, torch.Size((2, 400_000)), torch.float64)
    assert (noise.mean(1).abs() < 4 / 400_000**0.5).all()
    assert ((noise.var(1) - 1).abs() < 4 * (2 / 400_000) ** 0.5).all()
    assert ((noise.pow(4).mean(1) - 3).abs() < 4 * (96 / 400_000) ** 0.5).all()
    # Neighbours, the numbers of one counter, and the same place of two seeds and two steps.
    later = philox_normal(torch.tensor([0, 1]), 1, torch.Size((2, 400_000)), torch.float64)
    pairs = [(noise[0], noise[1]), (noise[0], later[0])]
    pairs += [(noise[0, :-lag], noise[0, lag:]) for lag in (1, 512, 1024, 2048)]
    for first, second in pairs:
        assert (first * second).mean().abs() < 4 / 390_000**0.5


def test_noise_is_of_seed_and_step_alone() -> None:
    def noise(seeds: int | list[int], batch: int, step: int, *, first_step: int = 0) -> torch.Tensor:
        shape = torch.Size((batch, 3, 31, 37))
        return PhiloxStreams(seeds).at(batch, torch.device("cpu"), first_step).draw(step, shape, torch.float32)

    assert torch.equal(noise(5, 4, 2)[1:3], noise([6, 7], 2, 2))
    assert torch.equal(noise(5, 4, 2), noise(5, 4, 0, first_step=2))
    assert not torch.equal(noise(5, 1, 2), noise(5, 1, 3))
    assert torch.equal(noise([2**64 - 1, -1], 2, 0)[0], noise(-1, 1, 0)[0])
    both = noise([6, 7], 4, 2)
    assert torch.equal(both[:2], both[2:])
    with pytest.raises(ValueError, match="3 seeds for a batch of 2"):
        noise([1, 2, 3], 2, 0)


def test_a_step_of_each_sample() -> None:
    seeds, shape = torch.tensor([3, 4]), torch.Size((2, 5))
    one, two = (philox_normal(seeds, step, shape, torch.float32) for step in (1, 2))
    assert torch.equal(philox_normal(seeds, torch.tensor([2, 1]), shape, torch.float32), torch.stack([two[0], one[1]]))
