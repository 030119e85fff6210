"""Tree sampling, against chains whose soft values and tilted laws are known exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from exact_laws import deviation, tensor
from fewstep.guidance import DiffusionTreeSampling
from fewstep.guidance.tree import soft_mean
from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS, Denoiser
from fewstep.samplers.per_sample import DenoisingChain
from pipelines.tiny import CASES
from tree_chains import FiniteChain

REWARDS = np.array([0.0, 2.0, -1.0, 1.0])
SCALE = 1.2


def reward(states: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(REWARDS)[states]


def sampling(seed: int = 0, chain: FiniteChain | None = None, **options: Any) -> DiffusionTreeSampling:
    options = {"scale": SCALE, "branching": 3, "parallel": 1, **options}
    return DiffusionTreeSampling(chain or FiniteChain.random(), reward, seed=seed, **options)


# ------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize(("widening", "parallel"), [((2.0, 0.5), 1), ((1.0, 0.6), 8)])
def test_with_uniform_selection_the_evidence_is_unbiased(widening: tuple[float, float], parallel: int) -> None:
    chain = FiniteChain.random()
    truth = chain.evidence(REWARDS, SCALE)
    trees = [sampling(seed, chain, selection="uniform", widening=widening, parallel=parallel) for seed in range(250)]
    for tree in trees:
        tree.run(60)
    # The budget was enough to search below the root.
    assert np.mean([len(tree.tree.children[0]) for tree in trees]) < 0.5 * np.mean([len(t.tree.leaves) for t in trees])
    ratios = tensor([[math.exp(tree.log_evidence) / truth] for tree in trees])
    assert deviation(ratios, [1.0]) < 3.5
    assert deviation(tensor([[math.exp(tree.root_log_evidence) / truth] for tree in trees]), [1.0]) < 3.5
    # And not the plain mean of rewards, which Jensen puts below.
    plain = math.exp(SCALE * float(chain.base_law() @ REWARDS)) / truth
    assert deviation(ratios, [plain]) > 5


def test_values_of_nodes_converge_to_the_soft_values() -> None:
    chain = FiniteChain.random()
    tree = sampling(chain=chain, selection="uniform", widening=(3.0, 0.5), parallel=32)
    tree.run(12000)
    exact = chain.weights(REWARDS, SCALE)
    values = np.exp(SCALE * tree.tree.values)
    depths = np.array(tree.tree.depths)
    compared = 0
    for depth in (1, 2, 3):
        nodes = np.flatnonzero(depths == depth)
        states = tree.tree.states(nodes)[:, 0].numpy()
        for state in range(4):
            found = values[nodes[states == state]]
            if len(found) >= 30:
                assert deviation(torch.from_numpy(found)[:, None], [exact[depth - 1][state]]) < 4.0
                compared += 1
    assert compared >= 8
    assert tree.log_evidence == pytest.approx(math.log(chain.evidence(REWARDS, SCALE)), abs=0.1)


def test_more_calls_bring_the_value_of_the_root_closer() -> None:
    chain = FiniteChain.random()
    truth = chain.evidence(REWARDS, SCALE)
    trees = [sampling(seed, chain, selection="uniform", widening=(2.0, 0.7), parallel=8) for seed in range(16)]
    errors = []
    for calls in (90, 1350):
        for tree in trees:
            tree.run(calls)
        errors.append(np.mean([(math.exp(tree.log_evidence) / truth - 1.0) ** 2 for tree in trees]) ** 0.5)
    # The error of 16 times as many independent samples is a quarter.
    assert errors[1] < 0.45 * errors[0]


def test_samples_follow_the_tilted_law() -> None:
    chain = FiniteChain.random()
    tree = sampling(chain=chain, selection="uniform", parallel=16)
    tree.run(9000)
    law = chain.base_law() * np.exp(SCALE * REWARDS)
    law /= law.sum()
    count = 400
    drawn = tree.sample(count)
    found = np.bincount(drawn.samples.numpy(), minlength=4)
    low, high = binom.interval(0.9995, count, law)
    assert ((low <= found) & (found <= high)).all()
    base = binom.interval(0.9995, count, chain.base_law())
    assert not ((base[0] <= found) & (found <= base[1])).all()
    assert torch.equal(drawn.rewards, reward(drawn.samples))
    assert torch.equal(tree.sample(9, seed=4).samples, tree.sample(9, seed=4).samples)
    assert not torch.equal(tree.sample(50, seed=4).samples, tree.sample(50, seed=5).samples)
    # The law of a draw, without its chance.
    samples = chain.results(tree.tree.states(tree.tree.leaves)).numpy()
    assert np.bincount(samples, tree.leaf_probabilities, 4) == pytest.approx(law, abs=0.04)


def test_the_bias_of_boltzmann_selection() -> None:
    """Unlucky children are not visited again: the evidence is too low, but the law comes closer to the tilted one."""
    chain = FiniteChain.random()
    truth = chain.evidence(REWARDS, SCALE)
    law = chain.base_law() * np.exp(SCALE * REWARDS) / truth
    ratios, laws = [], []
    for seed in range(40):
        tree = sampling(seed, chain, widening=(2.0, 0.8), parallel=4)
        tree.run(450)
        ratios.append(math.exp(tree.log_evidence) / truth)
        samples = chain.results(tree.tree.states(tree.tree.leaves)).numpy()
        laws.append(np.bincount(samples, tree.leaf_probabilities, 4))
    mean, error = np.mean(ratios), np.std(ratios) / math.sqrt(len(ratios))
    assert 0.6 < mean < 1.0 - 4 * error
    away, base = (0.5 * np.abs(found - law).sum() for found in (np.mean(laws, axis=0), chain.base_law()))
    assert away < 0.5 * base


def test_the_tilted_gaussian() -> None:
    """N(1, 0.36) in 50 ancestral steps, which make it N(1.0000, 0.2920), tilted by exp(-1.5 (x - 2.2)^2 / 2)."""
    options = {"timestep_spacing": "trailing", "beta_start": 1e-4, "beta_end": 0.02}
    scheduler = SAMPLERS["sde-dpm++1"].build(options)
    scheduler.set_timesteps(50)
    levels = {call.timestep: (call.alpha, call.sigma) for call in scheduler.plan}

    def network(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        alpha, sigma = tensor([levels[float(label)] for label in labels]).unbind(1)
        alpha, sigma = alpha[:, None], sigma[:, None]
        clean = 1.0 + 0.36 * alpha / (0.36 * alpha**2 + sigma**2) * (x - alpha)
        return (x - alpha * clean) / sigma

    chain = DenoisingChain(network, scheduler, 50, shape=(1,), dtype=torch.float64)
    precision = 1 / 0.2920 + 1.5
    mean = (1 / 0.2920 + 1.5 * 2.2) / precision
    log_z = -0.5 * math.log(0.2920 * precision) - 0.5 * 1.5 * 1.2**2 / (1 + 1.5 * 0.2920)
    rows = []
    for seed in range(20):
        tree = DiffusionTreeSampling(
            chain,
            lambda x: -0.5 * (x[:, 0] - 2.2) ** 2,
            scale=1.5,
            widening=(1.0, 0.6),
            selection="uniform",
            parallel=6,
            seed=seed,
        )
        tree.run(1600)
        assert len(tree.tree.root_rollouts) < 0.5 * len(tree.tree.leaves)
        ratio = math.exp(tree.log_evidence - log_z)
        leaves = chain.results(tree.tree.states(tree.tree.leaves))[:, 0].numpy()
        # Weighted by the evidence, averages over trees are unbiased where those of a tree are not.
        rows.append([ratio, ratio * (float(tree.leaf_probabilities @ leaves) - mean)])
    assert deviation(tensor(rows), [1.0, 0.0]) < 3.5
    assert deviation(tensor(rows), [1.0, 1.0 - mean]) > 5


@pytest.mark.parametrize(("selection", "slack"), [("uniform", 0.1), ("boltzmann", 0.15)])
def test_shares_of_the_modes_of_a_gaussian_mixture(selection: str, slack: float) -> None:
    """A reward that is a constant on each mode multiplies its share, and leaves its inside alone."""
    mixture = GaussianMixture(tensor([[-2.0], [0.5], [3.0]]), tensor([0.4, 0.2, 0.4]), tensor([0.3, 0.2, 0.5]))
    cuts, gains = tensor([-0.7, 1.5]), tensor([0.0, 1.5, -1.0])
    scheduler = SAMPLERS["sde-dpm++1"].build({"timestep_spacing": "trailing"})

    def network(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x)
        for label in labels.unique():
            at = labels == label
            alpha, sigma = (float(v) for v in scheduler.schedule.alpha_sigma(scheduler.schedule.level(float(label))))
            output[at] = mixture.predict(x[at], alpha, sigma, "epsilon")
        return output

    def modes(x: torch.Tensor) -> torch.Tensor:
        return gains[torch.bucketize(x[:, 0], cuts)]

    chain = DenoisingChain(network, scheduler, 25, shape=(1,), dtype=torch.float64)
    tree = DiffusionTreeSampling(chain, modes, selection=selection, parallel=64, seed=0)
    tree.run(20000)
    truth = np.array([0.3, 0.2, 0.5]) * np.exp(gains.numpy())
    truth /= truth.sum()
    leaves = chain.results(tree.tree.states(tree.tree.leaves))
    mode, weights = torch.bucketize(leaves[:, 0], cuts).numpy(), tree.leaf_probabilities
    shares = np.bincount(mode, weights, 3)
    assert shares == pytest.approx(truth, abs=slack)
    assert np.abs(np.array([0.3, 0.2, 0.5]) - truth).max() > 0.3
    means = np.bincount(mode, weights * leaves[:, 0].numpy(), 3) / shares
    assert means == pytest.approx([-2.0, 0.5, 3.0], abs=0.15)


# ----------------------------------------------------------------------------------------------------- identities


def test_the_backup_is_a_mean() -> None:
    values = np.array([0.3, -2.0, 1.1])
    exact = math.log(sum(math.exp(1.7 * v) for v in values) / 3) / 1.7
    assert soft_mean(values, 1.7) == pytest.approx(exact, rel=1e-14)
    assert soft_mean(np.repeat(values, 2), 1.7) == pytest.approx(exact, rel=1e-14)
    assert soft_mean(values, 0.0) == values.mean()
    assert soft_mean(values, 1e-7) == pytest.approx(values.mean(), abs=1e-6)
    assert soft_mean(values, math.inf) == 1.1
    assert soft_mean(values * 1000, 1.0) == pytest.approx(1100.0 - math.log(3), rel=1e-12)


def test_a_constant_reward_is_every_value() -> None:
    tree = DiffusionTreeSampling(
        FiniteChain.random(), lambda x: torch.full((len(x),), -3.25), branching=3, widening=(1.0, 0.5), seed=1
    )
    tree.run(300)
    np.testing.assert_allclose(tree.tree.values, -3.25, rtol=1e-12)
    assert tree.log_evidence == pytest.approx(-3.25)


def test_at_scale_zero_it_is_the_sampler_itself() -> None:
    chain = FiniteChain.random()
    tree = sampling(chain=chain, scale=0.0, widening=(2.0, 0.7), parallel=16)
    tree.run(6000)
    samples = chain.results(tree.tree.states(tree.tree.leaves)).numpy()
    assert np.bincount(samples, tree.leaf_probabilities, 4) == pytest.approx(chain.base_law(), abs=0.04)
    assert tree.log_evidence == 0.0


def test_the_first_rollouts_are_samples_of_the_base() -> None:
    """With the widening of the paper the root takes the first 36: v >= 2 (v + 1)^0.8 first holds for v = 36."""
    trees = [sampling(parallel=parallel) for parallel in (1, 9)]
    for tree in trees:
        tree.run(36 * 3)
        assert [len(children) for children in tree.tree.children[:1]] == [36]
        assert len(tree.tree.root_rollouts) == len(tree.tree.leaves) == 36
        assert tree.log_evidence == pytest.approx(tree.root_log_evidence, rel=1e-12)
        # All samples of one reward are drawn alike.
        equal = tree.leaf_probabilities[tree.tree.values[tree.tree.leaves] == 0.0]
        assert len(equal) > 5
        np.testing.assert_allclose(equal, equal[0], rtol=1e-12)
    assert np.array_equal(*(tree.tree.values[tree.tree.leaves] for tree in trees))
    for tree in trees:
        tree.run(90)
        assert len(tree.tree.root_rollouts) < len(tree.tree.leaves)


def test_visits_and_children_follow_the_widening() -> None:
    factor, exponent = 1.5, 0.6
    tree = sampling(widening=(factor, exponent))
    tree.run(1200)
    nodes = tree.tree
    assert nodes.visits[0] == tree._iterations
    for node, children in enumerate(nodes.children):
        if nodes.depths[node] == nodes.depth:
            assert not children
            continue
        assert 1 <= len(children) < factor * (nodes.visits[node] + 1) ** exponent + 1
        # A visit goes on to a child, of which one may be under way.
        coming = sum(rollout.node == node for rollout in tree._rollouts)
        assert nodes.visits[node] == nodes.visits[children].sum() + coming
        assert all(nodes.depths[child] == nodes.depths[node] + 1 for child in children)
        assert nodes.values[node] == pytest.approx(soft_mean(nodes.values[children], SCALE), rel=1e-12)


# ---------------------------------------------------------------------------------------------------- of pipelines


@pytest.mark.parametrize(("case", "parallel"), [("sd", 4), ("ddpm", 3), ("sd-img2img", 1)])
def test_denoisers_of_pipelines(case: str, parallel: int) -> None:
    """Network calls are those that the denoiser counts; the best leaf decodes to the image that was rewarded."""
    denoiser = Denoiser.from_pipeline(CASES[case].build(), **CASES[case].inputs())
    chain = DenoisingChain(denoiser, SAMPLERS["sde-dpm++"].build(denoiser.scheduler_config), 8)
    tree = DiffusionTreeSampling(
        chain,
        lambda x: x.flatten(1).mean(1),
        branching=[0, chain.steps - 2],
        widening=(1.0, 0.6),
        parallel=parallel,
        seed=0,
    )
    before = denoiser.evaluations
    assert tree.run(41) == denoiser.evaluations - before == 41
    best = tree.best(2)
    assert best.samples.shape == (2, *denoiser.shape)
    torch.testing.assert_close(best.samples.flatten(1).mean(1).double(), best.rewards)
    assert best.rewards[0] >= best.rewards[1] >= tree.sample(5).rewards.min()
    assert denoiser.evaluations - before == 41
    with torch.no_grad():
        images = denoiser.decode(best.samples[:1], "pt")
    assert torch.isfinite(images).all()
    getattr(denoiser, "close", lambda: None)()


@pytest.mark.parametrize("selection", ["boltzmann", "uniform"])
def test_children_are_chosen_in_proportion(selection: str) -> None:
    tree = sampling(selection=selection)
    tree.run(90)
    children = np.array(tree.tree.children[0])
    weights = np.exp(SCALE * tree.tree.values[children]) if selection == "boltzmann" else np.ones(len(children))
    random = np.random.default_rng(0)
    found = np.bincount([tree._choose(0, children, random) for _ in range(4000)], minlength=len(children))
    low, high = binom.interval(0.9999, 4000, weights / weights.sum())
    assert ((low <= found) & (found <= high)).all()
