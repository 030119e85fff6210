"""Folders of tiny real pipelines, and the command line as a function."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

from fewstep.scripts.cli import main
from pipelines.tiny import CASES

CLASS_NAMES = ("ant", "bee", "cat", "dog", "elk, moose")


def invoke(*arguments: object) -> Result:
    """``fewstep`` in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_refused(result: Result, *said: str) -> None:
    """One line on stderr that says so, nothing on stdout, exit code 2."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    for part in said:
        assert part in line


def pictures(folder: Path) -> dict[str, bytes]:
    """The PNG files below a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def save_class_model(folder: Path) -> Path:
    """A DiTPipeline with five classes that have names; two of them are of one class."""
    CASES["dit"].build().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = dict(enumerate(CLASS_NAMES))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_unconditional_model(folder: Path, pipeline: str = "DDPMPipeline") -> Path:
    """A pixel model; a DDIMPipeline differs from a DDPMPipeline in its name alone."""
    CASES["ddpm"].build().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = pipeline
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_text_model(folder: Path) -> Path:
    """Stable Diffusion with a tokenizer of single characters."""
    CASES["sd"].build(**_text_modules()).save_pretrained(folder)
    return folder


def _text_modules() -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = string.ascii_lowercase + string.digits
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return {
        "text_encoder": CLIPTextModel(config).eval(),
        "tokenizer": CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
    }
