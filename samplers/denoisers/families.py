"""How the pipelines that are taken apart call their networks, and with what."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Branch = Literal["conditional", "unconditional"]
_UNCONDITIONAL_FIRST: tuple[Branch, ...] = ("unconditional", "conditional")


@dataclass(frozen=True)
class Family:
    """How a pipeline calls its network.

    Attributes:
        network: the component.
        prompts: the argument of which there is one a prompt, where it is not text.
        first: the branches in the order of a joint batch, ``None`` where each is a call of its own.
        label: whether the network is given the time label itself, one a sample, or those divided by 1000.
        scale: the argument with the guidance scale.
        mean_only: the pipeline cuts the variances off that the network may predict too.
        whole: inputs for which the network is called in other ways.
    """

    network: str
    prompts: str | None = None
    first: tuple[Branch, ...] | None = _UNCONDITIONAL_FIRST
    label: Literal["as it is", "expanded", "in 0 to 1"] = "as it is"
    scale: str = "guidance_scale"
    mean_only: bool = False
    whole: tuple[str, ...] = ()


_ADAPTER = ("ip_adapter_image", "ip_adapter_image_embeds")
FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family("unet", whole=_ADAPTER),
    "StableDiffusionXLPipeline": Family("unet", whole=_ADAPTER),
    "StableDiffusion3Pipeline": Family("transformer", label="expanded", whole=(*_ADAPTER, "skip_guidance_layers")),
    "FluxPipeline": Family(
        "transformer",
        first=None,
        label="in 0 to 1",
        scale="true_cfg_scale",
        whole=(*_ADAPTER, *(f"negative_{name}" for name in _ADAPTER)),
    ),
    "DiTPipeline": Family(
        "transformer",
        prompts="class_labels",
        first=("conditional", "unconditional"),
        label="expanded",
        mean_only=True,
    ),
    "DDPMPipeline": Family("unet", prompts="batch_size"),
}
# Arguments of the networks with one row a sample; the others are the same for all.
ROWS = (
    "encoder_hidden_states",
    "timestep_cond",
    "added_cond_kwargs",
    "pooled_projections",
    "guidance",
    "class_labels",
)
_NO_CONDITIONS = ("sample", "hidden_states", "timestep", "return_dict")


def owner_of_call(cls: type) -> type:
    """The class whose ``__call__`` this one has."""
    return next((base for base in cls.__mro__ if "__call__" in vars(base)), cls)


def ask_for(pipeline: Any, family: Family, inputs: dict[str, Any], each: int) -> int | None:
    """Asks for so many samples of each prompt; returns the number of prompts, if it is known without encoding them."""
    if family.prompts is None:
        inputs["num_images_per_prompt"] = each
        return None
    if family.prompts == "batch_size":
        inputs["batch_size"] = each
        return 1
    labels = torch.as_tensor(inputs["class_labels"]).reshape(-1).tolist()
    count = pipeline.transformer.config.num_embeds_ada_norm
    if not labels or not all(isinstance(label, int) and 0 <= label <= count for label in labels):
        raise ValueError(f"class_labels={inputs['class_labels']} must be whole numbers from 0 to {count - 1}")
    inputs["class_labels"] = [label for label in labels for _ in range(each)]
    return len(labels)


def conditions_of(
    noted: list[dict[str, Any]], family: Family, batch: int, prompts: int
) -> dict[Branch, dict[str, Any]]:
    """By branch, what the network was given beside samples and time, with one row a prompt."""
    names: tuple[Branch, ...] = ("conditional", "unconditional")
    if family.first is None:
        parts = [(name, call, 0, 1) for name, call in zip(names, noted, strict=False)]
    else:
        (call,) = noted
        rows = len(call["sample"] if "sample" in call else call["hidden_states"])
        names = family.first if rows == 2 * batch else ("conditional",)
        parts = [(name, call, k, len(names)) for k, name in enumerate(names)]

    def first_of_each(value: torch.Tensor, k: int, count: int) -> torch.Tensor:
        part = value.chunk(count)[k]
        return part[:: len(part) // prompts]  # some pipelines do not repeat embeddings that they are given

    return {
        name: {
            key: map_rows(value, functools.partial(first_of_each, k=k, count=count)) if key in ROWS else value
            for key, value in call.items()
            if key not in _NO_CONDITIONS
        }
        for name, call, k, count in parts
    }


def map_rows(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A condition with its tensors changed."""
    if isinstance(value, Mapping):
        return {key: map_rows(part, change) for key, part in value.items()}
    return change(value) if isinstance(value, torch.Tensor) else value


def joined(conditions: list[Any]) -> Any:
    """The same condition of several branches in one batch."""
    first = conditions[0]
    if isinstance(first, Mapping):
        return {key: joined([one[key] for one in conditions]) for key in first}
    return torch.cat(conditions) if isinstance(first, torch.Tensor) else first
