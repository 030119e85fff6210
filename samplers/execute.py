"""A run of a plan over tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .fused.backend import FusedRows, check_backend, pass_for, serves
from .fused.operands import Gathered, Kept, gathered, reordered
from .fused.table import PlanTable
from .noise import NoiseToDraw
from .plan import Plan
from .rows import GuidedOutput, Thresholding, TorchRows, accumulation_dtype, compiled


class PlanRun:
    """The tensors of one run of a plan.

    Coefficients are float64 numbers; tensors are accumulated in float32 or better. The state between steps
    is kept in that precision too: where the caller hands back what the last step returned in half precision, the
    unrounded state is used in its place.

    On CUDA a call is one pass of a Triton kernel, and where compiled loops are asked for one of these; float64 samples,
    steps with gradients and other devices take torch's operations.

    Args:
        plan: what to execute.
        thresholding: applied to the predicted clean sample.
        backend: ``"torch"``, ``"compile"`` or ``"triton"``; by default what ``FEWSTEP_BACKEND`` says, or what suits the
            device.

    Attributes:
        plan: what is executed.
        thresholding: applied to the predicted clean sample.
        backend: that was asked for.
        position: number of the next call.

    Raises:
        ValueError: an unknown backend.
    """

    def __init__(self, plan: Plan, thresholding: Thresholding | None = None, *, backend: str | None = None) -> None:
        self._calls, self._slots = compiled(plan, fold=thresholding is None)
        self._stochastic = [call.is_stochastic for call in plan]
        self._rows = TorchRows(self._calls, thresholding)
        self.thresholding = thresholding
        self.backend = check_backend(backend)
        self._fused: FusedRows | None = None
        self._device: torch.device | None = None
        self.plan = plan
        self._begin()

    def _begin(self) -> None:
        self._values: list[Any] = [None] * self._slots
        self._state: Kept | None = None
        self._before: tuple[list[Any], Kept | None] = (self._values, None)
        self.position = 0

    def again(self) -> PlanRun:
        """Another run of the same plan, with the coefficients that this one has made ready."""
        run = copy.copy(self)
        run._begin()
        return run

    @property
    def is_stochastic(self) -> bool:
        """Whether the next step reads noise."""
        return self._stochastic[self.position]

    @property
    def is_over(self) -> bool:
        """Whether all calls were executed."""
        return self.position == len(self._calls)

    def undo(self) -> None:
        """Takes the last step back."""
        self._values, self._state = self._before
        self.position -= 1

    def reorder(self, ancestors: torch.Tensor) -> None:
        """Gathers every kept tensor along the batch: particle ``b`` goes on from particle ``ancestors[b]``."""
        self._values = [None if v is None else reordered(v, ancestors) for v in self._values]
        if self._state is not None:
            self._state = reordered(self._state, ancestors)
        if self._fused is None:
            self._gather()

    def step(
        self,
        sample: torch.Tensor,
        model_output: torch.Tensor | GuidedOutput,
        noise: torch.Tensor | NoiseToDraw | None = None,
        *,
        clean: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Executes the next call.

        Args:
            sample: what the network saw (before ``in_scale``), ``(batch, ...)``.
            model_output: what it returned, of the same shape; or both its outputs, to be guided.
            noise: standard normal, or what draws it; needed where ``is_stochastic``.
            clean: whether the predicted clean sample is wanted.

        Returns:
            the next input of the network (after the last call: the result), and the predicted clean sample or ``None``.
        """
        position, values = self.position, self._values
        self._before = (values.copy(), self._state)
        if sample.is_cuda or self.backend is not None:
            fused = self._fused_rows(sample, model_output, noise)
            if fused is not None:
                state = self._state if self._fits(sample) else None
                results = fused.execute(position, values, state, sample, model_output, noise, clean=clean)
                self._state = results.state
                self.position += 1
                return results.following, results.predicted
        if isinstance(model_output, GuidedOutput):
            model_output = model_output.combined()
        x = sample if sample.dtype is self._rows.dtype else self.widened(sample)
        if isinstance(noise, NoiseToDraw):
            noise = noise.draw(position, sample.shape, x.dtype)
        following, predicted = self._rows.execute(
            position, values, x, model_output, noise, owned=x is not sample, clean=clean
        )
        self.position += 1
        if following.dtype is sample.dtype:
            return following, predicted
        self._state = following
        return following.to(sample.dtype), None if predicted is None else predicted.to(sample.dtype)

    def predicted(self, sample: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
        """The clean sample that the next call's output means, clipped where this is configured.

        Args:
            sample: what the network saw, ``(batch, ...)``.
            model_output: of the same shape.
        """
        return self._rows.predicted(self.position, self.widened(sample), model_output)

    def widened(self, sample: torch.Tensor) -> torch.Tensor:
        """The sample in the dtype of accumulation, unrounded where the last step knows it."""
        dtype = accumulation_dtype(sample.dtype)
        if dtype is not self._rows.dtype:
            self._rows.bind(dtype)
        if dtype is sample.dtype:
            return sample
        wide = sample.to(dtype)
        if self._state is None or not self._fits(sample):
            return wide
        # Elementwise, without asking the device: what a callback changed is taken, the rest stays exact.
        state = gathered(self._state)
        return torch.where(state.to(sample.dtype) == sample, state, wide)

    def _fits(self, sample: torch.Tensor) -> bool:
        """Whether the state can be that of the sample."""
        state = self._state
        if state is None or accumulation_dtype(sample.dtype) == sample.dtype:
            return False
        if isinstance(state, Gathered):
            return state.tensor.shape[1:] == sample.shape[1:] and len(state.ancestors) == len(sample)
        return state.shape == sample.shape

    def _fused_rows(self, sample: torch.Tensor, model_output: Any, noise: Any) -> FusedRows | None:
        """The backend of one pass a call, where it takes these tensors."""
        if sample.device != self._device:
            self._gather()
            one_pass = pass_for(self.backend, sample.device)
            self._fused = None
            if one_pass is not None:
                table = PlanTable(self._calls, self._slots, clip=self.thresholding is not None)
                self._fused = FusedRows(table, self.thresholding, one_pass, sample.device)
            self._device = sample.device
        if self._fused is None:
            return None
        outputs = model_output[:2] if isinstance(model_output, GuidedOutput) else (model_output,)
        if serves(sample, *outputs, noise, *self._values):
            return self._fused
        self._gather()
        return None

    def _gather(self) -> None:
        """Puts kept tensors into the order that they were to be read in."""
        self._values[:] = [gathered(v) for v in self._values]
        self._state = None if self._state is None else gathered(self._state)
