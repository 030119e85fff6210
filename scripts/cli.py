"""The console command ``fewstep``: a group whose subcommands are imported when they are called."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import click

COMMANDS = {
    "generate": "Make images with a model and a sampler.",
    "tune": "Fit a sampler to a model, a number of steps and a guidance scale.",
    "train": "Train a small class-conditional model on your own images.",
    "fid": "Measure a model's images against real ones.",
    "bench": "Measure samplers on the bundled models and on exact ground truth.",
    "replicate": "Measure the claims of the papers again, and write a report.",
}
"""Subcommand -> its line in the help. The click object ``NAME`` lives in ``commands/NAME.py``."""


class InputError(click.ClickException):
    """Bad input: one line on stderr, exit code 2."""

    exit_code = 2


class LazyGroup(click.Group):
    """Imports a subcommand's module on its first use, so that ``--help`` does not wait for torch.

    Wrong usage, and every ``ValueError`` of a subcommand, is bad input: one line on stderr and exit code 2.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__package__}.commands.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise InputError(" ".join(error.format_message().split())) from error
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("fewstep"), prog_name="fewstep")
def main() -> None:
    """Diffusion samplers that drop into diffusers: better images in fewer network calls."""
