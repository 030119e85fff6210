"""Several rewards as one verifier, by the ranks that they give to candidates (arXiv 2501.09732)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .rewards import Reward, RewardFunction


def mean_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean over rewards of the candidates' ranks; equals share the mean of their ranks.

    Args:
        values: ``(groups, candidates, rewards)``.

    Returns:
        ``(groups, candidates)``, float64, from 1, the worst by all rewards, to the number of candidates.
    """
    here, others = values[:, :, None], values[:, None]
    ranks = (here > others).sum(2) + 0.5 * ((here == others).sum(2) + 1)
    return ranks.double().mean(2)


class VerifierEnsemble:
    """Rewards that judge together: the best candidate has the best mean rank (arXiv 2501.09732, section 4).

    No reward's scale, offset or outliers count, only its order. For the searches over noises, in the place of a reward:
    the candidates of a round, and the best so far, are ranked together.

    Args:
        rewards: two or more of them; a ``Reward`` to decode samples first.

    Raises:
        ValueError: fewer than two.
    """

    def __init__(self, rewards: Sequence[Reward | RewardFunction]) -> None:
        self.rewards = [Reward.of(reward) for reward in rewards]
        if len(self.rewards) < 2:
            raise ValueError(f"rewards has {len(self.rewards)} entries, of at least 2; search with the reward itself")

    def __call__(self, samples: torch.Tensor, where: str = "the samples") -> torch.Tensor:
        """All rewards of samples ``(batch, ...)``, ``(batch, rewards)`` in float64; see ``Reward``."""
        return torch.stack([reward(samples, where).double() for reward in self.rewards], dim=1)
