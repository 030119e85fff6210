"""Values that are learned from the sampler's own runs: Monte Carlo regression and soft Q-learning."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from fewstep.samplers.guided import Guidance, GuidedRun, GuidedStep

from .populations import GroupStreams, check_particles, groups_of
from .rewards import Reward, RewardFunction

OBJECTIVES = ("soft", "mean", "soft_q")


class ValueNetwork(ModelMixin, ConfigMixin):
    """A small network of samples and their half log-SNR: convolutions for images and latents, else a perceptron.

    Saved with ``save_pretrained``.

    Args:
        shape: of a sample: ``(C, H, W)``, or anything else, which is flattened.
        width: of the hidden layers.
    """

    @register_to_config
    def __init__(self, shape: Sequence[int], width: int = 64) -> None:
        super().__init__()
        self.is_image = len(shape) == 3
        if self.is_image:
            self.inside: nn.Module = nn.Conv2d(shape[0], width, 3, padding=1)
            self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(3))
        else:
            self.inside = nn.Linear(math.prod(shape), width)
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 3 * width))
        self.outside = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, half_logsnr: torch.Tensor) -> torch.Tensor:
        """Values ``(batch,)`` of samples ``(batch, ...)`` at ``half_logsnr`` ``(batch,)``."""
        waves = half_logsnr.clamp(-10.0, 10.0)[:, None] * 2.0 ** torch.arange(-3, 5, device=x.device)
        shifts = self.time(torch.cat([waves.sin(), waves.cos()], 1).to(x.dtype)).chunk(3, dim=1)
        hidden = self.inside(x if self.is_image else x.flatten(1))
        for layer, shift in zip(self.layers, shifts, strict=True):
            hidden = layer(nn.functional.silu(hidden + (shift[:, :, None, None] if self.is_image else shift)))
        if self.is_image:
            hidden = hidden.mean((2, 3))
        values: torch.Tensor = self.outside(nn.functional.silu(hidden)).squeeze(1)
        return values


@dataclass
class Transitions:
    """Steps of runs, of all calls together.

    Attributes:
        states: ``(N, ...)``, samples at network calls.
        half_logsnr: ``(N,)``, of those.
        followers: ``(N, M, ...)``, samples at the next call, drawn independently; of a last call, results.
        following: ``(N,)``, half log-SNR of those; infinite for results.
        follower_rewards: ``(N, M)``, of results; 0 where they are none.
        rewards: ``(N,)``, of the run's result.
    """

    states: torch.Tensor
    half_logsnr: torch.Tensor
    followers: torch.Tensor
    following: torch.Tensor
    follower_rewards: torch.Tensor
    rewards: torch.Tensor


class TransitionRecorder(Guidance):
    """Records what a value is learned from, in runs of any pipeline; the results keep their law.

    The ``followers`` images of a prompt are drawn from one state in every step, and the next state is any of them.

    Args:
        reward: of results.
        followers: drawn from each state, neighbours in the batch; 1 suffices for Monte Carlo regression.
        seeds: of the choices, see ``SVDD``.

    Raises:
        ValueError: impossible options.
    """

    def __init__(
        self,
        reward: Reward | RewardFunction,
        *,
        followers: int = 1,
        seeds: int | Sequence[int] | None = None,
    ) -> None:
        check_particles("followers", followers)
        self.reward, self.followers, self.seeds = Reward.of(reward), followers, seeds
        self._runs: list[Transitions] = []

    def start(self, run: GuidedRun) -> None:
        groups_of(len(run.sample), self.followers)
        self._streams = GroupStreams(self.seeds)
        self._samples: list[torch.Tensor] = []
        self._parents: list[torch.Tensor] = []
        self._levels: list[float] = []

    def act(self, step: GuidedStep) -> None:
        parents = self._any(len(step.sample), step.index, step.sample.device)
        # The samples are the followers of the last parents, and the parents of the next ones are among them.
        self._samples.append(step.sample.cpu())
        step.follow(parents.repeat_interleave(self.followers))
        self._parents.append(parents.cpu())
        self._levels.append(half_logsnr(step.call.alpha, step.call.sigma))

    def finish(self, samples: torch.Tensor) -> torch.Tensor:
        kept = self._any(len(samples), len(self._samples), samples.device)
        rewards = self.reward(samples, "the end").cpu()
        self._samples.append(samples.to(self._samples[0].dtype).cpu())
        self._levels.append(math.inf)
        groups, last = len(kept), len(self._parents) - 1
        for k, parents in enumerate(self._parents):
            followers = self._samples[k + 1].unflatten(0, (groups, self.followers))
            known = rewards.view(groups, self.followers) if k == last else torch.zeros(groups, self.followers)
            levels = (torch.full((groups,), level) for level in self._levels[k : k + 2])
            self._runs.append(
                Transitions(
                    self._samples[k][parents], next(levels), followers, next(levels), known, rewards[kept.cpu()]
                )
            )
        return kept.repeat_interleave(self.followers)

    @property
    def transitions(self) -> Transitions:
        """All that was recorded.

        Raises:
            ValueError: nothing was.
        """
        if not self._runs:
            raise ValueError(
                "nothing was recorded; guide a scheduler with the recorder and run its pipeline to the end"
            )
        return Transitions(
            **{name: torch.cat([getattr(run, name) for run in self._runs]) for name in vars(self._runs[0])}
        )

    def _any(self, batch: int, index: int, device: torch.device) -> torch.Tensor:
        groups = batch // self.followers
        picked = (self._streams.draw(groups, 1, index).squeeze(1) * self.followers).long()
        return (picked + self.followers * torch.arange(groups)).to(device)


def half_logsnr(alpha: float, sigma: float) -> float:
    """``log(alpha / sigma)``, infinite at the ends."""
    if alpha == 0.0:
        return -math.inf
    return math.inf if sigma == 0.0 else math.log(alpha) - math.log(sigma)


class LearnedValue:
    """A network's estimate of the reward to come, for ``SVDD``.

    Args:
        network: ``network(x, half_logsnr)`` returns ``(batch,)``; a ``ValueNetwork`` or one of that signature.
        reward: of results, which no network needs to guess.
    """

    def __init__(self, network: nn.Module, reward: Reward | RewardFunction) -> None:
        self.network, self.reward = network, Reward.of(reward)

    @torch.no_grad()
    def of_step(self, step: GuidedStep, where: str) -> torch.Tensor:
        """See ``Value``."""
        level = half_logsnr(step.call.alpha, step.call.sigma)
        x = step.sample.float()
        values: torch.Tensor = self.network(x, torch.full((len(x),), level, device=x.device))
        return values

    def of_results(self, samples: torch.Tensor) -> torch.Tensor:
        """See ``Value``."""
        return self.reward(samples, "the end")


def fit_value(
    network: nn.Module,
    data: Transitions,
    *,
    objective: str = "soft",
    temperature: float = 1.0,
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Trains a value (arXiv 2408.08252, section 6 and algorithm 3).

    ``soft`` and ``soft_q`` learn what SVDD wants, the soft value ``temperature * log E[exp(reward / temperature) |
    x_t]``. ``soft`` regresses on the results of runs; its loss ``exp(f) - exp(r) f`` has the same minimum as the
    paper's squared distance of exponentials, and finite gradients. ``soft_q`` regresses on the soft value of the
    network's own values of the followers, so that runs need not reach high rewards. ``mean`` learns
    ``E[reward | x_t]``, which is what the paper's released code does.

    Args:
        network: changed in place; left in evaluation mode.
        data: of a ``TransitionRecorder``, for ``soft_q`` with several followers.
        objective: ``soft``, ``mean`` or ``soft_q``.
        temperature: of the soft value, above 0.
        epochs: passes over the data.
        batch_size: transitions a step.
        learning_rate: of Adam, falling to 0 along a cosine.
        seed: of the order.

    Returns:
        mean loss of each epoch.

    Raises:
        ValueError: impossible options.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; use one of {', '.join(OBJECTIVES)}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be above 0 and finite; objective='mean' is its limit")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs {epochs} and batch_size {batch_size} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    batches = math.ceil(len(data.states) / batch_size)
    top = float(data.rewards.max())
    with torch.enable_grad():
        optimizer = torch.optim.Adam(network.parameters(), learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
        network.train()
        losses = []
        for _ in range(epochs):
            frozen = copy.deepcopy(network).eval().requires_grad_(False) if objective == "soft_q" else None
            order = torch.randperm(len(data.states), generator=generator)
            total = 0.0
            for chosen in order.split(batch_size):
                found = network(data.states[chosen].float().to(device), data.half_logsnr[chosen].to(device))
                if frozen is not None:
                    target = _follower_values(frozen, data, chosen, temperature, device)
                    loss = (found - target).square().mean()
                elif objective == "mean":
                    loss = (found - data.rewards[chosen].to(found)).square().mean()
                else:
                    z, r = (found - top) / temperature, (data.rewards[chosen].to(found) - top) / temperature
                    loss = (z.exp() - r.exp() * z).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(chosen)
            losses.append(total / len(order))
    network.eval()
    return losses


@torch.no_grad()
def _follower_values(
    network: nn.Module, data: Transitions, chosen: torch.Tensor, temperature: float, device: torch.device
) -> torch.Tensor:
    """``temperature * log mean exp(value / temperature)`` of the followers."""
    followers, levels = data.followers[chosen], data.following[chosen]
    count = followers.shape[1]
    known = data.follower_rewards[chosen].to(device)
    flat = levels.repeat_interleave(count).to(device)
    guessed = network(followers.flatten(0, 1).float().to(device), flat).view(-1, count)
    values = torch.where(torch.isinf(levels)[:, None].to(device), known, guessed)
    return temperature * ((values / temperature).logsumexp(1) - math.log(count))
