"""Masked diffusion over a joint table that is known exactly: samplers, and what SVDD makes of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.guidance import EnergyChoice, MaskedSampler, MaskedSVDD, sample_categorical

LENGTH, VOCABULARY = 3, 3


class JointTable:
    """A random law of short sequences; its conditionals by enumeration are the ideal network."""

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.sequences = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
        self.law = generator.dirichlet(np.full(len(self.sequences), 0.4))

    def agrees(self, tokens: torch.Tensor) -> torch.Tensor:
        """``(batch, sequences)``, whether a sequence has all tokens that are known."""
        known = tokens[:, None] == torch.from_numpy(self.sequences)
        return (known | (tokens[:, None] == VOCABULARY)).all(2)

    def __call__(self, tokens: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        weights = self.agrees(tokens) * torch.from_numpy(self.law)
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(self.sequences), VOCABULARY).double()
        return torch.einsum("bs,slv->blv", weights, one_hot).clamp(min=1e-300).log()

    def soft_value(self, reward: torch.Tensor, temperature: float) -> Any:
        """``temperature log E[exp(reward / temperature) | known tokens]``."""

        def value(tokens: torch.Tensor) -> torch.Tensor:
            weights = self.agrees(tokens) * torch.from_numpy(self.law)
            return temperature * ((weights @ (reward / temperature).exp()) / weights.sum(1)).log()

        return value


TABLE = JointTable()
COUNT = 20000


def number(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens * VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)).sum(1)


def histogram(tokens: torch.Tensor) -> np.ndarray:
    assert tokens.min() >= 0
    assert tokens.max() < VOCABULARY
    return np.bincount(number(tokens).numpy(), minlength=VOCABULARY**LENGTH)


def fits(tokens: torch.Tensor, law: np.ndarray) -> float:
    """The chi-square statistic's distance from its mean, in its standard deviations; rare sequences are pooled."""
    counts, expected = histogram(tokens), len(tokens) * law
    rare = expected < 8
    counts, expected = (np.append(v[~rare], v[rare].sum()) for v in (counts, expected))
    degrees = len(counts) - 1
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    return float((statistic - degrees) / math.sqrt(2 * degrees))


def sampler() -> MaskedSampler:
    return MaskedSampler(TABLE, length=LENGTH, vocabulary=VOCABULARY)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_first_hitting_is_exact_in_as_many_calls_as_tokens() -> None:
    masked = sampler()
    assert fits(masked.first_hitting(COUNT, generator=rng()), TABLE.law) < 4
    assert (masked.calls, masked.evaluations) == (LENGTH, LENGTH * COUNT)


def test_ancestral_sampling_converges_to_it() -> None:
    """One step draws all tokens by themselves; hundreds are all but exact."""
    single = sampler().ancestral(COUNT, steps=1, generator=rng())
    one_hot = np.eye(VOCABULARY)[TABLE.sequences]
    marginals = np.einsum("s,slv->lv", TABLE.law, one_hot)
    product = np.prod([marginals[k, TABLE.sequences[:, k]] for k in range(LENGTH)], axis=0)
    assert fits(single, product) < 4
    assert fits(single, TABLE.law) > 20
    assert fits(sampler().ancestral(5000, steps=400, generator=rng()), TABLE.law) < 5


def test_several_tokens_a_call_are_an_approximation() -> None:
    masked = sampler()
    tokens = masked.first_hitting(COUNT, tokens_per_call=2, generator=rng())
    assert masked.calls == 2
    assert fits(tokens, TABLE.law) > 20
    alone = sampler().first_hitting(COUNT, tokens_per_call=LENGTH, generator=rng())
    assert fits(alone, TABLE.law) > 20


def test_first_hitting_times_are_those_of_the_process() -> None:
    """With L masked tokens and the linear schedule, the n-th largest of L uniform numbers."""
    seen: list[torch.Tensor] = []

    def model(tokens: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        seen.append(times)
        return torch.zeros(*tokens.shape, VOCABULARY)

    MaskedSampler(model, length=4, vocabulary=VOCABULARY).first_hitting(COUNT, generator=rng())
    means = [float(times.mean()) for times in seen]
    assert means == pytest.approx([1.0, 4 / 5, 3 / 5, 2 / 5], abs=0.005)
    assert seen[1].std() > 0.1


def test_tokens_appear_at_the_stated_rate_in_a_large_vocabulary() -> None:
    """One of 256 steps over 50,257 equal tokens. In float32, Gumbel noise would let half of them appear."""
    vocabulary, steps, length = 50257, 256, 40000
    appeared = []

    def model(tokens: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        appeared.append(int((tokens != vocabulary).sum()))
        if len(appeared) == 2:
            raise StopIteration
        return torch.zeros(1, 1, vocabulary).expand(*tokens.shape, -1)

    with pytest.raises(StopIteration):
        MaskedSampler(model, length=length, vocabulary=vocabulary).ancestral(1, steps=steps, generator=rng())
    expected = length / steps
    assert appeared[1] == pytest.approx(expected, abs=4 * math.sqrt(expected))


def test_categorical_samples_invert_float64_sums() -> None:
    logits = torch.randn(7, 5, 11, generator=rng(1))
    drawn = sample_categorical(logits, rng(2), chunk=8)
    uniforms = torch.rand(35, generator=rng(2), dtype=torch.float64).numpy()
    weights = np.exp(logits.double().numpy().reshape(35, 11))
    cumulative = (weights / weights.sum(1, keepdims=True)).cumsum(1)
    expected = [int((row <= u).sum()) for row, u in zip(cumulative, uniforms, strict=True)]
    assert drawn.flatten().tolist() == expected
    never = torch.tensor([0.0, -math.inf, 1.0]).expand(5000, -1)
    assert (sample_categorical(never, rng()) != 1).all()


def test_gumbel_noise_of_few_digits_is_another_law() -> None:
    """Gumbel-max with uniform numbers up to ``exp(-exp(-M))``, against its closed form (2409.02908, proposition 5.2).

    Float32 has ``M = 16.6``; 1 shows the same with five classes. Ours have no such bound.
    """
    p, bound, count = np.array([0.02, 0.05, 0.13, 0.30, 0.50]), 1.0, 400000
    tails = p[::-1].cumsum()[::-1]
    before = np.append(np.inf, tails[1:] / p[:-1])  # of the first class, the second term is 0
    before[1:] = tails[1:] / p[:-1]
    left = np.arange(len(p), 0, -1)
    shrink = math.exp(-bound)
    beta = (np.exp((left - tails / p) * shrink) - np.exp((left - before) * shrink)) / tails
    truncated = p * beta.cumsum()
    assert truncated == pytest.approx([0.0, 0.0002, 0.0303, 0.2820, 0.6875], abs=1e-4)
    uniforms = torch.rand(count, 5, generator=rng(), dtype=torch.float64) * math.exp(-shrink)
    drawn = (torch.from_numpy(p).log() - (-uniforms.log()).log()).argmax(1)
    error = 4.0 / math.sqrt(count)
    assert np.bincount(drawn.numpy(), minlength=5) / count == pytest.approx(truncated, abs=error)
    ours = sample_categorical(torch.from_numpy(p).log().expand(count, -1), rng())
    assert np.bincount(ours.numpy(), minlength=5) / count == pytest.approx(p, abs=error)


# ----------------------------------------------------------------------------------------- energies

PAIR = torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=torch.float64)


def pair_model(tokens: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """The exact conditionals of two correlated bits."""
    known = torch.where(tokens.flip(1)[..., None] == 2, 1.0, 2.0 * PAIR[tokens.flip(1).clamp(max=1)])
    return (0.5 * known).log()


def pair_energy(clean: torch.Tensor, tokens: torch.Tensor, log_proposal: torch.Tensor) -> torch.Tensor:
    return log_proposal - PAIR[clean[:, 0], clean[:, 1]].log()


@pytest.mark.parametrize(
    ("draws", "steps", "equal"), [(1, 1, 0.25), (2, 1, 0.350), (4, 1, 0.416), (16, 1, 0.443), (4, 4, 0.441)]
)
def test_energies_let_tokens_depend_on_each_other(draws: int, steps: int, equal: float) -> None:
    """Probability of each of the equal pairs: 0.45 in truth, 0.25 for independent tokens."""
    masked = MaskedSampler(pair_model, length=2, vocabulary=2)
    tokens = masked.ancestral(COUNT, steps=steps, energy=EnergyChoice(pair_energy, draws), generator=rng())
    found = np.bincount((2 * tokens[:, 0] + tokens[:, 1]).numpy(), minlength=4) / COUNT
    assert found == pytest.approx([equal, 0.5 - equal, 0.5 - equal, equal], abs=4 * math.sqrt(0.25 / COUNT))
    assert masked.calls == steps


def test_one_draw_or_equal_energies_are_the_model_itself() -> None:
    one_hot = np.eye(VOCABULARY)[TABLE.sequences]
    marginals = np.einsum("s,slv->lv", TABLE.law, one_hot)
    independent = np.prod([marginals[k, TABLE.sequences[:, k]] for k in range(LENGTH)], axis=0)

    def likelihood(clean: torch.Tensor, tokens: torch.Tensor, log_proposal: torch.Tensor) -> torch.Tensor:
        return log_proposal - torch.from_numpy(TABLE.law)[number(clean)].log()

    for choice in (EnergyChoice(likelihood, 1), EnergyChoice(lambda clean, *_: torch.zeros(len(clean)), 6)):
        assert fits(sampler().ancestral(COUNT, steps=1, energy=choice, generator=rng()), independent) < 4
    joint = sampler().ancestral(COUNT, steps=2, energy=EnergyChoice(likelihood, 64), generator=rng())
    assert 0.5 * np.abs(histogram(joint) / COUNT - TABLE.law).sum() < 0.03
    assert 0.5 * np.abs(independent - TABLE.law).sum() > 0.2


# ----------------------------------------------------------------------------------------- SVDD

REWARD = torch.from_numpy(np.random.default_rng(5).normal(size=VOCABULARY**LENGTH))
TEMPERATURE = 0.5


def reward(tokens: torch.Tensor) -> torch.Tensor:
    return REWARD[number(tokens)]


def target() -> np.ndarray:
    weights = TABLE.law * np.exp(REWARD.numpy() / TEMPERATURE)
    return weights / weights.sum()


def distance(tokens: torch.Tensor) -> float:
    """Total variation from the target."""
    return float(0.5 * np.abs(histogram(tokens) / len(tokens) - target()).sum())


@pytest.mark.parametrize("method", ["first_hitting", "ancestral"])
def test_exact_values_and_many_candidates_give_the_tilted_law(method: str) -> None:
    """The distance falls with the number of candidates, to that of a sample of the target itself."""
    options: dict[str, Any] = {} if method == "first_hitting" else {"steps": 12}
    distances = []
    for candidates in (1, 4, 32):
        steering = MaskedSVDD(
            reward,
            candidates=candidates,
            temperature=TEMPERATURE,
            value=TABLE.soft_value(REWARD, TEMPERATURE),
        )
        tokens = getattr(sampler(), method)(4000, steering=steering, generator=rng(), **options)
        distances.append(distance(tokens))
    assert distances[0] > 0.2
    assert distances[1] < 0.6 * distances[0]
    assert distances[2] < 0.06


def test_no_steering_where_there_is_nothing_to_choose() -> None:
    plain = sampler().first_hitting(COUNT, generator=rng())
    for steering in (
        MaskedSVDD(reward, candidates=4, temperature=math.inf),
        MaskedSVDD(lambda x: torch.zeros(len(x)), candidates=4, temperature=0.1),
    ):
        assert fits(sampler().first_hitting(COUNT, steering=steering, generator=rng(1)), TABLE.law) < 4
    assert fits(plain, TABLE.law) < 4


@pytest.mark.parametrize("fill", ["argmax", "sample"])
def test_posterior_means_raise_the_reward(fill: str) -> None:
    """By filling masks with the network's prediction: no other calls than the candidates' own."""
    base = float(reward(sampler().first_hitting(2000, generator=rng())).mean())
    rewards = []
    for temperature in (TEMPERATURE, 0.0):
        masked = sampler()
        steering = MaskedSVDD(reward, candidates=8, temperature=temperature, fill=fill)
        rewards.append(float(reward(masked.first_hitting(2000, steering=steering, generator=rng())).mean()))
        assert (masked.calls, masked.evaluations) == (LENGTH, LENGTH * 16000)
    exact = float(target() @ REWARD.numpy())
    assert base + 0.3 < rewards[0] < rewards[1]
    assert abs(rewards[0] - exact) < 0.5 * (exact - base)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedSVDD(reward, candidates=0, temperature=1.0), "candidates 0"),
        (lambda: MaskedSVDD(reward, candidates=2, temperature=-1.0), "temperature -1.0"),
        (lambda: MaskedSVDD(reward, candidates=2, temperature=1.0, fill="mask"), "fill 'mask'"),
        (lambda: EnergyChoice(pair_energy, 0), "draws 0"),
        (
            lambda: MaskedSampler(pair_model, length=2, vocabulary=2).ancestral(
                2, steps=1, energy=EnergyChoice(lambda clean, *_: clean, 3)
            ),
            r"'minus energy' returned \(6, 2\)",
        ),
        (lambda: MaskedSampler(TABLE, length=0, vocabulary=3), "length 0"),
        (lambda: sampler().first_hitting(2, tokens_per_call=0), "tokens_per_call 0"),
        (lambda: sampler().ancestral(2, steps=0), "steps 0"),
        (lambda: MaskedSampler(TABLE, length=LENGTH, vocabulary=4).first_hitting(2), "model returned shape"),
    ],
)
def test_impossible_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
