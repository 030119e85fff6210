"""What all trees share: budgets, going on, files, bounds, errors; and the search of the highest reward."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from safetensors.torch import load_file

from analytic import STABLE_DIFFUSION
from fewstep.guidance import DiffusionTreeSampling, DiffusionTreeSearch, Reward, tree_growth
from fewstep.guidance.tree_growth import TreeMethod
from fewstep.samplers import SAMPLERS
from fewstep.samplers.per_sample import DenoisingChain
from tree_chains import FiniteChain, WordChain

Build = Callable[..., TreeMethod]


def gaussian_chain(sampler: str = "sde-dpm++", steps: int = 8) -> DenoisingChain:
    """Of a network that is elementwise, so that batches cannot change a bit of it."""

    def network(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + labels[:, None] / 1000)

    return DenoisingChain(network, SAMPLERS[sampler].build(STABLE_DIFFUSION), steps, shape=(3,), dtype=torch.float64)


def total(x: torch.Tensor) -> torch.Tensor:
    return x.sum(1)


def sampling(chain: Any = None, **options: Any) -> DiffusionTreeSampling:
    options = {"branching": 4, "widening": (1.0, 0.6), "seed": 3, **options}
    return DiffusionTreeSampling(chain or gaussian_chain(), options.pop("reward", total), **options)


def search(chain: Any = None, **options: Any) -> DiffusionTreeSearch:
    options = {"branching": 4, "widening": (1.0, 0.6), "seed": 3, **options}
    return DiffusionTreeSearch(chain or gaussian_chain(), options.pop("reward", total), **options)


def assert_same(one: TreeMethod, other: TreeMethod) -> None:
    a, b = one.tree, other.tree
    assert (a.parents, a.depths, a.calls, a.children) == (b.parents, b.depths, b.calls, b.children)
    assert np.array_equal(a.values, b.values)
    assert np.array_equal(a.visits, b.visits)
    nodes = range(1, len(a))
    assert torch.equal(a.states(nodes), b.states(nodes))
    assert one.network_calls == other.network_calls
    assert [(r.node, r.seed, r.position, r.moved) for r in one._rollouts] == [
        (r.node, r.seed, r.position, r.moved) for r in other._rollouts
    ]
    for mine, theirs in zip(one._rollouts, other._rollouts, strict=True):
        assert torch.equal(mine.state, theirs.state)
        assert all(torch.equal(x, y) for x, y in zip(mine.trail, theirs.trail, strict=True))


# --------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("parallel", [1, 5])
@pytest.mark.parametrize("build", [sampling, search])
def test_the_budget_is_spent_to_the_last_call(build: Build, parallel: int) -> None:
    chain = gaussian_chain()
    tree = build(chain, parallel=parallel)
    spent = 0
    for budget in (1, 7, 0, 100, 13):
        assert tree.run(budget) == budget
        spent += budget
        assert tree.network_calls == chain.evaluations == spent


@pytest.mark.parametrize("parallel", [1, 3, 8])
@pytest.mark.parametrize("build", [sampling, search])
def test_it_goes_on_as_if_it_had_not_stopped(build: Build, parallel: int, tmp_path: Path) -> None:
    whole = build(parallel=parallel)
    whole.run(400)
    parts = build(parallel=parallel)
    for budget in (1, 2, 50, 146):
        parts.run(budget)
    # On the way, to a file and back, in the middle of rollouts.
    assert any(rollout.moved for rollout in parts._rollouts) or parallel == 1
    parts.save(tmp_path / "tree")
    loaded = type(parts).load(tmp_path / "tree", gaussian_chain(), total)
    assert_same(loaded, parts)
    for tree in (parts, loaded):
        tree.run(201)
        assert_same(tree, whole)
    assert len(whole.tree.leaves) > 20
    assert max(len(children) for children in whole.tree.children[1:]) > 2


def test_a_budget_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = gaussian_chain()
    tree = sampling(chain, parallel=2)
    monkeypatch.setattr(tree_growth.time, "monotonic", lambda: 0.5 * chain.evaluations)
    assert tree.run(seconds=10.0) == 20
    assert tree.run(6, seconds=10.0) == 6
    assert tree.run(600, seconds=10.0) == 20
    assert tree.run(seconds=0.0) == 0


def test_runs_without_budget_are_refused() -> None:
    with pytest.raises(ValueError, match="run needs a budget"):
        sampling().run()
    with pytest.raises(ValueError, match="network_calls -1 must be"):
        sampling().run(-1)
    with pytest.raises(ValueError, match="seconds nan must be"):
        sampling().run(seconds=math.nan)


def test_rollouts_at_different_times_share_a_batch() -> None:
    chain = gaussian_chain()
    seen: list[tuple[int, ...]] = []
    advance = chain.advance

    def watched(states: torch.Tensor, positions: Any, seeds: Any) -> torch.Tensor:
        seen.append(tuple(positions))
        return advance(states, positions, seeds)

    chain.advance = watched  # type: ignore[method-assign]
    sampling(chain, parallel=6).run(600)
    assert {len(positions) for positions in seen} == {6}
    assert sum(len({*positions}) > 1 for positions in seen) > len(seen) / 2


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("parallel", [1, 4])
def test_memory_is_bounded(parallel: int) -> None:
    tree = sampling(max_nodes=60, parallel=parallel)
    made = tree.run(5000)
    assert made < 5000
    assert 55 <= len(tree.tree) <= 60
    assert not tree._rollouts
    assert len(tree.sample(3).samples) == 3
    with pytest.raises(ValueError, match="max_nodes 60 is reached"):
        tree.run(10)
    tree.max_nodes = 80
    assert tree.run(50) > 0
    assert len(tree.tree) <= 80


def test_states_are_kept_where_one_wants_them() -> None:
    # Nothing can be read from there, and nothing is before the root has its first children.
    tree = sampling(device="meta", widening=(2.0, 0.8))
    tree.run(64)
    assert {block.device.type for block in tree.tree._blocks} == {"meta"}
    assert sampling(device="cpu").tree.device == torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------- files


def test_a_loaded_tree_is_the_saved_one(tmp_path: Path) -> None:
    tree = search(scale=math.inf, exploration=0.3, max_nodes=500, parallel=2)
    tree.run(333)
    tree.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree.json", "tree.safetensors"]
    content = json.loads((tmp_path / "tree.json").read_text())
    assert content["nodes"] == len(tree.tree)
    tensors = load_file(tmp_path / "tree.safetensors")
    assert torch.equal(tensors["values"], torch.from_numpy(tree.tree.values))
    loaded = DiffusionTreeSearch.load(tmp_path, gaussian_chain(), total, device="cpu")
    assert_same(loaded, tree)
    for name in ("scale", "exploration", "widening", "branching", "parallel", "seed", "max_nodes"):
        assert getattr(loaded, name) == getattr(tree, name)
    assert torch.equal(loaded.best(3).samples, tree.best(3).samples)


def test_an_empty_tree_can_be_saved(tmp_path: Path) -> None:
    sampling().save(tmp_path)
    loaded = DiffusionTreeSampling.load(tmp_path, gaussian_chain(), total)
    loaded.run(100)
    fresh = sampling()
    fresh.run(100)
    assert_same(loaded, fresh)


def test_other_trees_are_refused(tmp_path: Path) -> None:
    tree = sampling()
    tree.run(50)
    tree.save(tmp_path)
    with pytest.raises(ValueError, match=r"a tree of DiffusionTreeSampling; load it with DiffusionTreeSampling\.load"):
        DiffusionTreeSearch.load(tmp_path, gaussian_chain(), total)
    with pytest.raises(ValueError, match="the tree of another chain"):
        DiffusionTreeSampling.load(tmp_path, gaussian_chain(steps=9), total)
    with pytest.raises(ValueError, match="holds no tree"):
        DiffusionTreeSampling.load(tmp_path / "nowhere", gaussian_chain(), total)
    header = (tmp_path / "tree.json").read_text()
    tree.run(50)
    tree.save(tmp_path)
    (tmp_path / "tree.json").write_text(header)
    with pytest.raises(ValueError, match="its two files are of different times"):
        DiffusionTreeSampling.load(tmp_path, gaussian_chain(), total)
    (tmp_path / "tree.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds a damaged tree"):
        DiffusionTreeSampling.load(tmp_path, gaussian_chain(), total)
    (tmp_path / "tree.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(ValueError, match="no tree of version 1"):
        DiffusionTreeSampling.load(tmp_path, gaussian_chain(), total)


# ---------------------------------------------------------------------------------------------------------- errors


def test_a_reward_that_fails_leaves_the_tree_as_it_was() -> None:
    wrong = [False]

    def moody(x: torch.Tensor) -> torch.Tensor:
        return x.sum(1) * (math.nan if wrong[0] else 1.0)

    tree, steady = sampling(reward=moody, parallel=3), sampling(reward=total, parallel=3)
    tree.run(100)
    leaves = len(tree.tree.leaves)
    wrong[0] = True
    with pytest.raises(ValueError, match=r"reward 'moody' is nan at network call \d+"):
        tree.run(100)
    assert len(tree.tree.leaves) == leaves
    spent = tree.network_calls
    wrong[0] = False
    tree.run(300 - spent)
    steady.run(300)
    assert_same(tree, steady)


def test_a_reward_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reward 'pixels' returned \(1, 3\) at network call 8"):
        sampling(reward=Reward(lambda x: x, name="pixels")).run(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widening": (0.0, 0.5)}, "widening"),
        ({"widening": (2.0, 1.5)}, "widening"),
        ({"parallel": 0}, "parallel 0"),
        ({"branching": 9}, "branching 9 must lie in 1 to 8"),
        ({"branching": [0, 8]}, "from 0 to 7"),
        ({"branching": [3, 1]}, "rising numbers"),
        ({"branching": [0, 7]}, "branching at step 7 makes equal children"),
        ({"max_nodes": 5}, "max_nodes 5 is too small"),
        ({"scale": -1.0}, "negate the reward"),
        ({"scale": math.inf}, "scale inf"),
        ({"selection": "greedy"}, "use one of boltzmann, uniform"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling(**options)


def test_impossible_options_of_a_search_are_refused() -> None:
    with pytest.raises(ValueError, match="exploration -1"):
        search(exploration=-1.0)
    with pytest.raises(ValueError, match="scale nan"):
        search(scale=math.nan)
    with pytest.raises(ValueError, match="makes equal children"):
        search(gaussian_chain("unipc"))


def test_a_tree_without_leaves_has_no_results() -> None:
    tree = sampling()
    tree.run(7)
    for results in (tree.sample, tree.best, lambda: tree.log_evidence, lambda: tree.plot("tree.png")):
        with pytest.raises(ValueError, match="the tree has 0 leaves, fewer than 1; a whole rollout takes 8"):
            results()
    tree.run(1)
    assert len(tree.best().rewards) == 1
    with pytest.raises(ValueError, match="has 1 leaves, fewer than 2"):
        tree.best(2)
    for results in (tree.sample, tree.best):
        with pytest.raises(ValueError, match="count 0"):
            results(0)


# ---------------------------------------------------------------------------------------------------------- search


def payoff(words: torch.Tensor) -> torch.Tensor:
    """Good digits add up, and one word of all is the best by far."""
    gains = torch.tensor([[0.0, 0.3, 0.1], [0.2, 0.0, 0.3], [0.1, 0.3, 0.0], [0.3, 0.0, 0.2], [0.0, 0.1, 0.3]])
    values = gains.gather(1, words.T).sum(0)
    return values + 0.5 * (words == torch.tensor([1, 2, 1, 0, 2])).all(1)


def test_search_finds_the_best_leaf_of_a_tree_that_can_be_enumerated() -> None:
    words = torch.cartesian_prod(*[torch.arange(3)] * 5)
    best = float(payoff(words).max())
    budget, found = 700, 0
    for seed in range(20):
        chain = WordChain(5, 3)
        tree = DiffusionTreeSearch(
            chain, payoff, scale=math.inf, branching=5, widening=(2.0, 0.4), exploration=0.4, seed=seed
        )
        assert tree.run(budget) == budget == chain.evaluations
        winner = tree.best()
        assert torch.equal(payoff(winner.samples).double(), winner.rewards)
        found += float(winner.rewards[0]) == best
    # As many calls buy 140 whole words, which hold one of 243 with this probability.
    by_chance = 1.0 - (1.0 - 1.0 / 243) ** (budget / 5)
    assert by_chance < 0.45
    assert found >= 17


def test_selection_is_that_of_uct() -> None:
    tree = search(FiniteChain.random(), branching=3, exploration=0.7, reward=lambda s: s.double())
    tree.run(300)
    nodes = tree.tree
    rng = np.random.default_rng(0)
    chosen = set()
    for node, children in enumerate(nodes.children):
        if len(children) < 2:
            continue
        scores = [
            nodes.values[child] + 0.7 * math.sqrt(math.log(nodes.visits[node] + 1) / (nodes.visits[child] + 1))
            for child in children
        ]
        pick = tree._choose(node, np.array(children), rng)
        assert pick == scores.index(max(scores))
        chosen.add(pick)
    assert len(chosen) > 1
    tree.exploration = 0.0
    root = nodes.children[0]
    assert tree._choose(0, np.array(root), rng) == int(np.argmax(nodes.values[root]))


def test_search_backs_up_the_maximum_at_infinite_scale() -> None:
    tree = search(scale=math.inf, parallel=4)
    tree.run(400)
    for node, children in enumerate(tree.tree.children):
        if children:
            assert tree.tree.values[node] == tree.tree.values[children].max()
    assert tree.tree.values[0] == float(tree.best().rewards[0])


# --------------------------------------------------------------------------------------- other rewards, and pictures


def test_another_reward_needs_no_network_call() -> None:
    chain = gaussian_chain()
    tree = sampling(chain, parallel=4)
    tree.run(800)
    before = chain.evaluations

    def first(x: torch.Tensor) -> torch.Tensor:
        return 3.0 * x[:, 0]

    tree.rescore(first, scale=0.5)
    assert chain.evaluations == before
    samples = chain.results(tree.tree.states(range(1, len(tree.tree))))

    def exact(node: int) -> float:
        children = tree.tree.children[node]
        if not children:
            return math.exp(0.5 * float(first(samples[node - 1 : node])))
        return sum(exact(child) for child in children) / len(children)

    for node in range(len(tree.tree)):
        assert math.exp(0.5 * tree.tree.values[node]) == pytest.approx(exact(node), rel=1e-10)
    tree.rescore(scale=0.0)
    assert tree.tree.values[0] == pytest.approx(float(np.mean(tree.tree.values[tree.tree.children[0]])), rel=1e-12)
    with pytest.raises(ValueError, match="reward 'blank' is nan at the leaves of the tree"):
        tree.rescore(Reward(lambda x: x[:, 0] * math.nan, name="blank"))
    assert tree.reward.name == "first"
    tree.run(50)


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    savefig = Figure.savefig

    def watched(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        savefig(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    tree = sampling(parallel=4)
    tree.run(600)
    for name in ("tree.png", "tree.svg"):
        tree.plot(tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tree.png", "tree.svg"]
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")
    nodes, growth = figures[0].axes[:2]
    (drawn,) = (c for c in nodes.collections if isinstance(c, PathCollection))
    places = np.asarray(drawn.get_offsets())
    assert places[:, 1].tolist() == tree.tree.depths
    assert np.array_equal(np.asarray(drawn.get_array()), tree.tree.values)
    assert np.array_equal(np.argsort(drawn.get_sizes(), kind="stable"), np.argsort(tree.tree.visits, kind="stable"))
    leaves = tree.tree.leaves
    # No two leaves on one place, and every parent among its children.
    assert len({*places[leaves, 0]}) == len(leaves)
    for node, children in enumerate(tree.tree.children):
        if children:
            assert places[children, 0].min() <= places[node, 0] <= places[children, 0].max()
    assert np.array_equal(growth.lines[0].get_ydata(), tree.tree.values[leaves])
    assert growth.lines[1].get_ydata()[-1] == float(tree.best().rewards[0])
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        tree.plot(tmp_path / "tree.jpg")
