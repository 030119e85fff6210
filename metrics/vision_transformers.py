"""DINOv2 and CLIP as feature extractors, through transformers."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F

from .extractors import FeatureExtractor

_DINOV2_SIZE = 224
_MEAN_STD = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Of the images that the released models were trained on, in 0 to 1."""


class VisionTransformer(FeatureExtractor):
    """DINOv2's class token after the last norm, or CLIP's projected image embedding before normalisation.

    The whole image is resized to the network's square, as arXiv 2306.04675 does it.

    Args:
        name: ``"dinov2"`` or ``"clip"``.
        network: a ``Dinov2Model`` or a ``CLIPVisionModelWithProjection``.
    """

    def __init__(self, name: str, network: Any) -> None:
        config = network.config
        self._edge = _DINOV2_SIZE if name == "dinov2" else config.image_size
        mean, std = _MEAN_STD[name]
        super().__init__(
            name,
            config.hidden_size if name == "dinov2" else config.projection_dim,
            None,
            f"grey repeated in three channels; {self._edge} x {self._edge} by antialiased bicubic interpolation; "
            f"x / 255 less {mean} over {std}",
        )
        self.network = network
        self._mean, self._std = mean, std
        self.freeze()

    def _evaluate(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        edge = (self._edge, self._edge)
        resized = F.interpolate(images.float(), edge, mode="bicubic", antialias=True).clamp(0.0, 255.0)
        mean, std = (resized.new_tensor(v).view(1, 3, 1, 1) for v in (self._mean, self._std))
        output = self.network(pixel_values=(resized / 255.0 - mean) / std)
        return output.pooler_output if self.name == "dinov2" else output.image_embeds, None

    def _architecture(self) -> str:
        config = self.network.config.to_dict()
        # Where it was loaded from, in what precision and by which version does not change the features.
        for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
            config.pop(key, None)
        return json.dumps(config, sort_keys=True, default=str)


def load_vision_transformer(name: str, weights: str) -> VisionTransformer:
    """Loads a released or own model, from safetensors only.

    Args:
        name: ``"dinov2"`` or ``"clip"``.
        weights: a folder, or a hub id, which is downloaded where it is not on this machine.

    Raises:
        ValueError: transformers is not installed, the weights are not there, or are of another kind of model.
    """
    try:
        from transformers import AutoConfig, CLIPVisionModelWithProjection, Dinov2Model
        from transformers.utils import logging
    except ImportError:
        raise ValueError(f"{name} needs transformers; install fewstep[text]") from None
    try:
        config = AutoConfig.from_pretrained(weights)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"weights {weights} are neither a folder nor a hub id with a {name} model: {reason}") from None
    if config.model_type not in (name, f"{name}_vision_model"):
        raise ValueError(f"weights {weights} are of a {config.model_type} model, not of {name}")
    if config.model_type == "clip":
        # The image tower's own settings do not hold the size that the whole model projects to.
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    kind = Dinov2Model if name == "dinov2" else CLIPVisionModelWithProjection
    # Of CLIP the text tower stays on disk, which is announced weight by weight.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        network, loading = kind.from_pretrained(
            weights, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"weights {weights} hold no {name} model that can be loaded: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])[0]
        raise ValueError(f"weights {weights} hold no complete {name} model: {missing} is missing")
    return VisionTransformer(name, network)
