from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from fewstep.metrics import feature_extractor

SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights, as the hub's are saved."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    dinov2 = Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2, image_size=28, patch_size=14))
    vision = {**SHAPE, "intermediate_size": 16, "image_size": 32, "patch_size": 16}
    text = {**SHAPE, "intermediate_size": 16, "vocab_size": 50}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=6))
    for name, model in {"dinov2": dinov2, "clip": clip, "tower": tower}.items():
        model.save_pretrained(root / name)
    text_only = CLIPTextConfig(**text)
    text_only.save_pretrained(root / "text")
    return {name: root / name for name in ("dinov2", "clip", "tower", "text")}


def images(count: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, channels, 40, 56), generator=generator, dtype=torch.uint8)


def prepared(image: torch.Tensor, edge: int, mean: Any, std: Any) -> torch.Tensor:
    """Each channel resized by Pillow in floating point."""
    planes = [Image.fromarray(plane.numpy().astype(np.float32)) for plane in image]
    resized = np.stack([np.array(plane.resize((edge, edge), Image.Resampling.BICUBIC)) for plane in planes])
    x = torch.from_numpy(resized).clamp(0, 255) / 255
    return ((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


@torch.no_grad()
def test_dinov2_is_the_class_token_of_the_prepared_image(folders: dict[str, Path]) -> None:
    extractor = feature_extractor("dinov2", folders["dinov2"])
    model = Dinov2Model.from_pretrained(folders["dinov2"]).eval()
    x = images(2)
    for k in range(2):
        pixels = prepared(x[k], 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(extractor(x[k : k + 1]), expected, rtol=1e-3, atol=1e-4)
    assert (extractor.name, extractor.size, extractor.classes) == ("dinov2", 8, None)
    assert extractor.features_and_logits(x)[1] is None


@torch.no_grad()
def test_clip_is_the_projected_embedding_of_the_prepared_image(folders: dict[str, Path]) -> None:
    extractor = feature_extractor("clip", str(folders["clip"]))
    model = CLIPModel.from_pretrained(folders["clip"]).eval()
    x = images(1)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    output = model.vision_model(pixel_values=prepared(x[0], 32, mean, std))
    torch.testing.assert_close(extractor(x), model.visual_projection(output.pooler_output), rtol=1e-3, atol=1e-4)
    assert (extractor.name, extractor.size) == ("clip", 6)
    # Grey is RGB with equal channels.
    grey = images(1, 1)
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
    # The image tower alone is as good.
    assert feature_extractor("clip", folders["tower"])(x).shape == (1, 6)


def test_fingerprint_is_of_weights_and_architecture(folders: dict[str, Path], tmp_path: Path) -> None:
    first = feature_extractor("dinov2", folders["dinov2"]).fingerprint
    Dinov2Model.from_pretrained(folders["dinov2"]).save_pretrained(tmp_path / "copy")
    assert feature_extractor("dinov2", tmp_path / "copy").fingerprint == first
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    assert feature_extractor("dinov2", tmp_path / "copy").fingerprint != first
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["layernorm.bias"] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert feature_extractor("dinov2", tmp_path / "copy").fingerprint != first


def test_refusals(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="has no classes"):
        feature_extractor("dinov2", folders["dinov2"]).logits(images(1))
    with pytest.raises(ValueError, match="are of a clip model, not of dinov2"):
        feature_extractor("dinov2", folders["clip"])
    with pytest.raises(ValueError, match="are of a dinov2 model, not of clip"):
        feature_extractor("clip", folders["dinov2"])
    with pytest.raises(ValueError, match="are of a clip_text_model model, not of clip"):
        feature_extractor("clip", folders["text"])
    for missing in (tmp_path, "nobody/knows-this"):
        with pytest.raises(ValueError, match="neither a folder nor a hub id") as caught:
            feature_extractor("clip", missing)
        assert len(str(caught.value).splitlines()) == 1
    # A folder with its settings and no weights.
    (tmp_path / "config.json").write_text((folders["dinov2"] / "config.json").read_text())
    with pytest.raises(ValueError, match="hold no dinov2 model that can be loaded"):
        feature_extractor("dinov2", tmp_path)
    # What is missing would be drawn at random.
    Dinov2Model.from_pretrained(folders["dinov2"]).save_pretrained(tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"hold no complete dinov2 model: layernorm.bias is missing"):
        feature_extractor("dinov2", tmp_path / "part")
