"""A stochastic sampler as a Markov chain whose samples may stand at different steps of one batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch

from .denoisers.denoiser import Denoiser
from .fused.backend import Pass, check_backend, pass_for, serves
from .fused.operands import Operands
from .fused.table import CallLayout
from .noise import NoiseStreams
from .plan import NOISE, PREDICTION, SAMPLE, Plan
from .rows import Thresholding, accumulation_dtype
from .scheduler import PlanScheduler
from .trajectory import Network, limits_of


class PerSamplePlan:
    """A plan as one matrix a call: what the sample and the kept tensors become.

    A *state* is the sample with the tensors that the plan keeps of it, ``(1 + slots, *shape)``. One-step samplers keep
    none.

    Args:
        plan: to execute.
        thresholding: of the predicted clean sample.

    Attributes:
        plan: what is executed.
        slots: number of kept tensors.
    """

    def __init__(self, plan: Plan, thresholding: Thresholding | None = None) -> None:
        self.plan, self._thresholding = plan, thresholding
        self._table: torch.Tensor | None = None
        names = {SAMPLE: 0}
        for call in plan:
            for name in (call.keep_sample, call.keep_prediction, *(row.out for row in call.rows)):
                if name is not None:
                    names.setdefault(name, len(names))
        self.slots = len(names) - 1
        names |= {PREDICTION: len(names), NOISE: len(names) + 1}
        self._rows = np.stack([_matrix(plan, k, names) for k in range(len(plan))])
        self._clean = np.array([call.clean for call in plan])
        self._prediction = np.array([call.prediction for call in plan])
        # Where the clean sample was thresholded, the noise prediction follows from it.
        self._of_clean = np.array(
            [(0.0, 1.0) if call.measure == "data" else (1 / call.sigma, -call.alpha / call.sigma) for call in plan]
        )

    def step(
        self, states: torch.Tensor, model_output: torch.Tensor, positions: Sequence[int], noise: torch.Tensor
    ) -> torch.Tensor:
        """Executes a call of each sample's own.

        Args:
            states: ``(batch, 1 + slots, *shape)``, in float32 or better.
            model_output: of the network at ``states[:, 0]``, ``(batch, *shape)``.
            positions: number of the call that each sample is at.
            noise: standard normal, shaped like ``model_output``; only read where the sample's call draws noise.

        Returns:
            the next states.
        """
        at = np.asarray(positions)
        one_pass = pass_for(check_backend(None), states.device) if serves(states, model_output, noise) else None
        if one_pass is not None:
            return self._fused(one_pass, states, model_output, at, noise)
        x, u = states[:, 0], model_output.to(states.dtype)
        if self._thresholding is None:
            prediction = self._sum([(self._prediction[at, 0], x), (self._prediction[at, 1], u)])
        else:
            clean = self._thresholding(self._sum([(self._clean[at, 0], x), (self._clean[at, 1], u)]))
            prediction = self._sum([(self._of_clean[at, 0], x), (self._of_clean[at, 1], clean)])
        sources = [*states.unbind(1), prediction, noise.to(states.dtype)]
        rows = self._rows[at]
        return torch.stack([self._sum(list(zip(row.T, sources, strict=True))) for row in rows.swapaxes(0, 1)], dim=1)

    def _fused(
        self, one_pass: Pass, states: torch.Tensor, model_output: torch.Tensor, at: np.ndarray, noise: torch.Tensor
    ) -> torch.Tensor:
        """``step`` in one pass, which each sample's own row of the table rules."""
        x, *kept = states.unbind(1)
        if self._table is None or self._table.device != states.device:
            self._table = torch.from_numpy(self._numbers()).float().to(states.device, non_blocking=True)
        bound = None
        if self._thresholding is not None:
            bound = self._thresholding.bound(
                self._sum([(self._clean[at, 0], x), (self._clean[at, 1], model_output.to(states.dtype))])
            )
        operands = Operands(
            sample=x,
            model_output=model_output,
            unconditional=None,
            scale=None,
            noise=noise,
            kept=kept,
            state=None,
            clip=self._thresholding is not None,
            bound=bound,
            table=self._table,
            index=torch.from_numpy(at.astype(np.int32)).to(states.device, non_blocking=True),
            clean=False,
        )
        slots, columns = tuple(range(self.slots)), tuple(range(3 + self.slots))
        results = one_pass(operands, CallLayout(True, slots, slots, (), (columns,) * (self.slots + 2)))
        return torch.stack([results.following, *results.kept], dim=1)

    def _numbers(self) -> np.ndarray:
        """The rows of the table, by what a pass reads: sample, output or clipped clean sample, noise, kept tensors."""
        pair = self._prediction if self._thresholding is None else self._of_clean
        sample, *kept, prediction, noise = np.moveaxis(self._rows, 2, 0)
        columns = [sample + prediction * pair[:, :1], prediction * pair[:, 1:], noise, *kept]
        return np.concatenate([self._clean, np.stack(columns, axis=2).reshape(len(self._rows), -1)], axis=1)

    @staticmethod
    def _sum(terms: list[tuple[np.ndarray, torch.Tensor]]) -> torch.Tensor:
        """Sum of tensors, each with a factor a sample."""
        total: torch.Tensor | None = None
        for factors, tensor in terms:
            if not factors.any():
                continue
            column = torch.from_numpy(factors).to(tensor.device, tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))
            total = tensor * column if total is None else total.addcmul_(tensor, column)
        return torch.zeros_like(terms[0][1]) if total is None else total


def _matrix(plan: Plan, k: int, names: dict[str, int]) -> np.ndarray:
    """Call ``k``: from the state, the prediction and the noise to the next state."""
    call = plan.calls[k]
    values = dict(enumerate(np.eye(len(names))))
    following = values[names[SAMPLE]]
    for row in call.rows:
        result = np.sum([c * values[names[slot]] for slot, c in row.terms], axis=0)
        if row.out == SAMPLE:
            following = result
        else:
            values[names[row.out]] = result
    for kept, source in ((call.keep_sample, SAMPLE), (call.keep_prediction, PREDICTION)):
        if kept is not None:
            values[names[kept]] = np.eye(len(names))[names[source]]
    for slot in call.drop:
        values[names[slot]] = np.zeros(len(names))
    return np.stack([following, *(values[index] for index in range(1, len(names) - 2))])


class DenoisingChain:
    """The Markov chain of a stochastic sampler: one network call a step, every sample at a step of its own.

    A sample is known by its seed: it is what the scheduler makes after ``manual_seed(seed)`` from the first noise of
    ``torch.Generator().manual_seed(seed)``, whoever else is in the batch. Multistep samplers carry their history in the
    state, which makes them Markov chains too.

    Args:
        model: the denoiser of a pipeline, with one image of one prompt (``num_images_per_prompt=1``): batches grow as
            they must, but for pipelines that are driven as they are, where samples go through the network one by one.
            Or a network as a function of samples ``(batch, *shape)`` and time labels ``(batch,)``.
        scheduler: of ours; stochastic where copies of a sample shall part.
        num_inference_steps: number of steps.
        shape: of one sample, of a network that is a function; a denoiser knows it.
        dtype: of the samples, of such a network.
        device: of the samples, of such a network.

    Attributes:
        steps: number of network calls of a whole run.
        noisy: which of them draw noise.
        device: of the samples.
        state_shape: of the state of one sample, ``(1 + slots, *shape)``.
        fingerprint: of what the scheduler computes.
        evaluations: of the network, counted for each sample.

    Raises:
        ValueError: a denoiser of several samples, a network without shape, or a scheduler that does more in its steps
            than its plan says.
    """

    evaluations: int = 0

    def __init__(
        self,
        model: Denoiser | Network,
        scheduler: PlanScheduler,
        num_inference_steps: int,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        _check_scheduler(scheduler)
        self._model, self._scheduler, self._asked_steps = model, scheduler, num_inference_steps
        self._one_by_one = False
        if isinstance(model, Denoiser):
            if shape is not None:
                raise ValueError(f"shape {tuple(shape)} is for networks that are functions; a denoiser knows its own")
            if model.batch_size != 1:
                raise ValueError(
                    f"model makes {model.batch_size} samples; make the denoiser of one prompt with "
                    "num_images_per_prompt=1"
                )
            from .denoisers.driven import DrivenDenoiser

            self._one_by_one = isinstance(model, DrivenDenoiser)
            first = self._first(0)
        elif shape is None:
            raise ValueError("shape is missing; a network that is a function needs the shape of one sample")
        else:
            scheduler.set_timesteps(num_inference_steps)
            first = torch.empty(1, *shape, dtype=dtype, device=device)
        self._like, self.device = first, first.device
        plan = scheduler.plan
        # Where a pipeline starts from an image, the scheduler counts the steps that it leaves out.
        self._skipped = scheduler.begin_index or 0
        self._plan = PerSamplePlan(plan, limits_of(scheduler))
        self._labels = torch.tensor([call.timestep for call in plan], dtype=scheduler.timesteps.dtype)
        self._in_scales = np.array([call.in_scale for call in plan])
        self.steps = len(plan)
        self.noisy = tuple(call.is_stochastic for call in plan)
        self.state_shape = (1 + self._plan.slots, *first.shape[1:])
        content = json.dumps([plan.to_dict(), list(self.state_shape), str(first.dtype)])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def start(self, seeds: Sequence[int]) -> torch.Tensor:
        """States before the first step, ``(len(seeds), *state_shape)``."""
        first = torch.cat([self._first(seed) for seed in seeds])
        states = first.new_zeros(len(first), *self.state_shape, dtype=accumulation_dtype(first.dtype))
        states[:, 0] = first
        return states

    @torch.no_grad()
    def advance(self, states: torch.Tensor, positions: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """One step of every sample.

        Args:
            states: ``(batch, *state_shape)``.
            positions: how many steps each sample has made, below ``steps``.
            seeds: of the samples.

        Returns:
            the next states.
        """
        x = self.results(states)
        output = self._output(x, positions)
        if output.shape != x.shape:
            output = self._scheduler._mean_of(output, x)
        self.evaluations += len(x)
        return self._plan.step(states, output, positions, self._noise(states[:, 0], positions, seeds))

    def results(self, states: torch.Tensor) -> torch.Tensor:
        """The samples ``(batch, *shape)`` of states, in the dtype of the model's samples."""
        return states[:, 0].to(self._like.dtype)

    def _first(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self._model, Denoiser):
            return self._model.prepare(self._scheduler, self._asked_steps, generator=generator).latents
        like = self._like
        noise = torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
        return noise * self._scheduler.init_noise_sigma

    def _output(self, x: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        at = torch.tensor(positions)
        scales = torch.from_numpy(self._in_scales)[at]
        if bool((scales != 1.0).any()):
            x = x * scales.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))
        labels = self._labels[at]
        if self._one_by_one:
            return torch.cat([self._model(row, label) for row, label in zip(x.split(1), labels, strict=True)])
        return self._model(x, labels.to(x.device))

    def _noise(self, x: torch.Tensor, positions: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        shape = torch.Size([1, *x.shape[1:]])
        drawn = [
            NoiseStreams(seed).draw(self._skipped + position, shape, torch.device("cpu"), x.dtype)
            if self.noisy[position]
            else torch.zeros(shape, dtype=x.dtype)
            for seed, position in zip(seeds, positions, strict=True)
        ]
        return torch.cat(drawn).to(x.device)


def _check_scheduler(scheduler: PlanScheduler) -> None:
    """Refuses schedulers whose steps are not those of their plan alone."""
    if not isinstance(scheduler, PlanScheduler):
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}; use one of ours, such as "
            "SAMPLERS['sde-dpm++1'].build(scheduler.config)"
        )
    if type(scheduler).step is not PlanScheduler.step or "theta_schedule" in scheduler.config:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} does more in a step than a plan says, for the batch as a whole; "
            "use a plain one, such as SAMPLERS['sde-dpm++1']"
        )
    if scheduler._guidance is not None:
        raise ValueError(f"scheduler {type(scheduler).__name__} has guidance, which acts on whole runs; guide(None) it")
