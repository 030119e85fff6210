"""Rewards: what is handed to them, what they may return, and the ready-made ones against libraries."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from PIL import Image
from torchmetrics.image import PeakSignalNoiseRatio, TotalVariation

from fewstep.guidance import (
    SVDD,
    FeynmanKacSteering,
    Reward,
    RewardTilt,
    brightness,
    class_log_probability,
    clip_score,
    compressibility,
    decoder_of,
    metric_reward,
)
from fewstep.metrics import DigitsClassifier
from fewstep.samplers import SAMPLERS, Denoiser
from pipelines.tiny import CASES, batched, seeded

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.flatten(1), r"reward 'broken' returned \(5, 768\) at call 3"),
        (lambda x: x.mean(), r"reward 'broken' returned \(\) at call 3"),
        (lambda x: [0.0] * len(x), "returned list at call 3"),
        (lambda x: torch.tensor([0.0, 1.0, math.nan, 3.0, 4.0]), r"is nan at call 3 \(samples \[2\]\)"),
        (lambda x: torch.tensor([0.0, 1.0, 2.0, -math.inf, math.inf]), r"is -inf at call 3 \(samples \[3, 4\]\)"),
    ],
)
def test_what_is_no_reward_is_named(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reward(function, name="broken")(IMAGES, "call 3")


@pytest.mark.parametrize("method", ["steering", "svdd"])
def test_errors_name_reward_and_step_in_a_pipeline(method: str) -> None:
    def sometimes(x: torch.Tensor) -> torch.Tensor:
        sometimes.calls += 1  # type: ignore[attr-defined]
        return torch.full((len(x),), math.nan if sometimes.calls == 3 else 0.0)  # type: ignore[attr-defined]

    sometimes.calls = 0  # type: ignore[attr-defined]
    pipe = CASES["sd"].build()
    pipe.scheduler = SAMPLERS["sde-dpm++"].build(pipe.scheduler.config)
    steering = FeynmanKacSteering([RewardTilt(sometimes)], particles=2)
    pipe.scheduler.guide(steering if method == "steering" else SVDD(sometimes, candidates=2, temperature=1.0))
    with pytest.raises(ValueError, match="reward 'sometimes' is nan at call 3 of 4"):
        CASES["sd"].call(pipe, **batched(CASES["sd"].inputs(), 2))


def test_batches_are_judged_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    sizes: list[int] = []

    def size(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return x.flatten(1).sum(1).half()

    reward = Reward(size, batch_size=2, progress=True)
    values = reward(IMAGES)
    assert (sizes, values.dtype, reward.evaluations) == ([2, 2, 1], torch.float32, 5)
    torch.testing.assert_close(values, IMAGES.flatten(1).sum(1), rtol=1e-3, atol=0.5)
    assert "size, the samples" in capsys.readouterr().err
    with pytest.raises(ValueError, match="batch_size 0"):
        Reward(size, batch_size=0)
    with pytest.raises(ValueError, match="cannot be called"):
        Reward("brightness")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_where_a_pipeline_disables_them(mode: Any) -> None:
    with mode():
        values, gradient = Reward(lambda x: x.flatten(1).square().sum(1)).with_gradient(IMAGES.clone(), "here")
    torch.testing.assert_close(gradient, 2 * IMAGES)
    assert not values.requires_grad
    with pytest.raises(ValueError, match="reward 'compressibility' has no gradient"):
        Reward(compressibility()).with_gradient(IMAGES, "here")


# ----------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("case", ["sd", "sd3", "ddpm"])
def test_decoders_decode_as_pipelines_do(case: str) -> None:
    pipe = CASES[case].build()
    latents = seeded(3, *CASES[case].shape[1:], seed=2)
    inputs = {} if case == "ddpm" else batched(CASES[case].inputs(), 3)
    denoiser = Denoiser.from_pipeline(pipe, num_images_per_prompt=3 if case == "ddpm" else 1, **inputs)
    expected = torch.from_numpy(denoiser.decode(latents, "np")).permute(0, 3, 1, 2)
    for source in (pipe, denoiser) if case != "ddpm" else (pipe,):
        with torch.no_grad():
            torch.testing.assert_close(decoder_of(source)(latents), expected, rtol=1e-4, atol=1e-5)


def test_packed_latents_need_the_pipelines_own_decoding() -> None:
    pipe = CASES["flux"].build()
    with pytest.raises(ValueError, match=r"decoder_of\(Denoiser"):
        decoder_of(pipe)(seeded(*CASES["flux"].shape))
    denoiser = Denoiser.from_pipeline(pipe, **CASES["flux"].inputs())
    assert decoder_of(denoiser)(seeded(*CASES["flux"].shape)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="neither vae nor unet"):
        decoder_of(object())


def test_a_pipeline_is_steered_by_its_images() -> None:
    pipe = CASES["sd"].build()
    pipe.scheduler = SAMPLERS["sde-dpm++"].build(pipe.scheduler.config).manual_seed(0)
    inputs = batched(CASES["sd"].inputs(), 4)
    decode = decoder_of(pipe)
    base = decode(CASES["sd"].call(pipe, **inputs))
    reward = Reward(brightness, decode=decode, batch_size=2)
    pipe.scheduler.guide(FeynmanKacSteering([RewardTilt(reward, 1000.0, gradient_scale=0.1)], particles=4, seeds=0))
    assert brightness(decode(CASES["sd"].call(pipe, **inputs))).mean() > brightness(base).mean()
    assert reward.evaluations == 4 * 5


# ----------------------------------------------------------------------------------------- ready-made


def test_class_log_probability_of_digits() -> None:
    classifier = DigitsClassifier.bundled()
    images = seeded(4, 1, 32, 32).clamp(-1, 1)
    expected = torch.log_softmax(classifier(images), 1)
    torch.testing.assert_close(Reward(class_log_probability(classifier, 8))(images), expected[:, 8])
    even = class_log_probability(classifier, [0, 2, 4, 6, 8])(images)
    torch.testing.assert_close(even, expected[:, ::2].exp().sum(1).log())
    _, gradient = Reward(class_log_probability(classifier, 8)).with_gradient(images, "here")
    assert gradient.abs().max() > 0
    with pytest.raises(ValueError, match="label 10 must lie in 0 to 9"):
        class_log_probability(classifier, 10)(images)
    with pytest.raises(ValueError, match="names no class"):
        class_log_probability(classifier, [])


def test_compressibility_is_minus_the_size_of_a_file() -> None:
    pixels = (IMAGES * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for image_format, options in (("jpeg", {"quality": 95}), ("png", {"optimize": True})):
        values = Reward(compressibility(image_format))(IMAGES)
        for value, image in zip(values, pixels, strict=True):
            file = io.BytesIO()
            Image.fromarray(image).save(file, image_format, **options)
            assert float(value) == pytest.approx(-len(file.getvalue()) / 1000)
    smooth = torch.full((1, 1, 16, 16), 0.5)
    assert compressibility("png")(smooth) > compressibility("png")(torch.rand(1, 1, 16, 16))
    with pytest.raises(ValueError, match="image_format 'gif'"):
        compressibility("gif")
    with pytest.raises(ValueError, match="quality 0"):
        compressibility(quality=0)
    with pytest.raises(ValueError, match="files are made of"):
        compressibility()(torch.rand(2, 4, 8, 8))


def test_brightness() -> None:
    torch.testing.assert_close(brightness(IMAGES), IMAGES.mean((1, 2, 3)))


def test_metrics_of_torchmetrics_image_by_image() -> None:
    expected = [float(TotalVariation()(image[None])) for image in IMAGES]
    assert Reward(metric_reward(TotalVariation(), sign=-1.0))(IMAGES).tolist() == pytest.approx([-v for v in expected])
    reference = IMAGES[:1].flip(-1)
    reward = Reward(metric_reward(PeakSignalNoiseRatio(data_range=1.0), reference))
    errors = (IMAGES - reference).square().mean((1, 2, 3))
    assert reward(IMAGES).tolist() == pytest.approx((-10 * errors.log10()).tolist(), rel=1e-4)
    assert reward.name == "PeakSignalNoiseRatio"
    with pytest.raises(ValueError, match="is no metric"):
        metric_reward(brightness)


def test_clip_score_of_a_model_on_this_machine(tmp_path: Any) -> None:
    """A tiny CLIP of random weights, against transformers' own call."""
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={c: k for k, c in enumerate(vocabulary)}, merges=[], model_max_length=20
    )
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(vocabulary),
        "bos_token_id": 52,
        "eos_token_id": 53,
        "max_position_embeddings": 20,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    processor = transformers.CLIPImageProcessor(size=size, crop_size=size)
    transformers.CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(tmp_path)

    score = clip_score("a cat", str(tmp_path))
    whole = (IMAGES * 255).round().byte()
    values, gradient = Reward(score).with_gradient(whole / 255, "here")
    pixels = processor(list(whole), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(**tokenizer(["a cat"], return_tensors="pt"), pixel_values=pixels)
    torch.testing.assert_close(values, 100 * (output.image_embeds @ output.text_embeds.T)[:, 0], rtol=1e-3, atol=1e-3)
    assert gradient.abs().max() > 0
    with pytest.raises(ValueError, match="is not on this machine"):
        clip_score("a cat", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    for name in ("empty", "bert"):
        with pytest.raises(ValueError, match=f"folder .*{name} holds no CLIP model"):
            clip_score("a cat", str(tmp_path / name))
