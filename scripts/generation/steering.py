"""Steering from the words of the command line: one table of methods, for help, checks and records."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .choices import unknown
from .options import parse_options

CORRECTED = "feynman-kac"
"""What a record calls the sampler of ``fkc``, which brings its own."""

Noise = Literal["needed", "refused", "either", "own"]


@dataclass(frozen=True)
class Method:
    """A steering method.

    Attributes:
        summary: for the help.
        options: name -> default; those of ``_UNSET`` may be ``None``.
        noise: whether the sampler must draw noise of its own, must not, or either will do; ``"own"`` brings its own
            sampler.
        needs_reward: whether there is anything to do without one.
        particles: whether there may be several.
        finds: whether rewards on the way are of finished images, whose best counts, or of predictions.
    """

    summary: str
    options: Mapping[str, Any]
    noise: Noise
    needs_reward: bool = True
    particles: bool = True
    finds: bool = False

    @property
    def sampler(self) -> str:
        """The sampler where the user names none."""
        return {"needed": "sde-dpm++", "own": CORRECTED}.get(self.noise, "dpm++")


POPULATION = {"resampling": "systematic", "threshold": 0.5, "every": 1, "start": 0.0, "stop": 1.0}
"""Options of every population of Feynman-Kac, and their defaults."""
_PARTICLES = {**POPULATION, "pick": "draw"}
_TREE = {"calls": None, "branching": None, "widening": [2.0, 0.8], "parallel": 1}

METHODS: Mapping[str, Method] = {
    "best-of-n": Method(
        "the best of rounds x N independent images", {"rounds": 1, "combine": "sum"}, "either", finds=True
    ),
    "zero-order": Method(
        "climbs to better noises nearby, N a round",
        {"rounds": 4, "similarity": 0.95, "combine": "sum"},
        "refused",
        finds=True,
    ),
    "paths": Method(
        "searches over the noises on the way, N at a time",
        {"rounds": 1, "paths": 2, "start": 0.25, "forward": 1, "backward": 2, "combine": "sum"},
        "either",
        finds=True,
    ),
    "fk": Method(
        "Feynman-Kac steering: samples p(x) exp(scale r(x)) with N particles",
        {"scale": 1.0, "potential": "difference", **_PARTICLES},
        "needed",
    ),
    "fkc": Method(
        "Feynman-Kac correctors: p^exponent and guidance as the densities they claim to be, tilted by rewards if any",
        {"exponent": 1.0, "churn": None, "solver_order": 2, "scale": 1.0, "potential": "difference", **_PARTICLES},
        "own",
        needs_reward=False,
    ),
    "reward-gradient": Method(
        "fk whose particles also move along the gradient of the reward",
        {"scale": 1.0, "gradient_scale": 1.0, "potential": "difference", **_PARTICLES},
        "needed",
    ),
    "svdd": Method(
        "every step goes on from one of N candidates, by value",
        {"temperature": 0.1, "start": 0.0, "stop": 1.0},
        "needed",
    ),
    "dts": Method(
        "diffusion tree sampling of p(x) exp(scale r(x)) in calls network calls (N whole runs)",
        {"scale": 1.0, "selection": "boltzmann", **_TREE},
        "needed",
        finds=True,
    ),
    "dts-star": Method(
        "diffusion tree search for the highest reward in calls network calls (N whole runs)",
        {"scale": 1.0, "exploration": 1.0, **_TREE},
        "needed",
        finds=True,
    ),
    "minority": Method(
        "towards a class of a classifier of rare samples",
        {"target": 9, "scale": 1.0, "classifier": None},
        "either",
        needs_reward=False,
        particles=False,
    ),
    "self-minority": Method(
        "towards rare samples by the model alone",
        {"scale": 0.1, "timestep": 800.0, "every": 1, "distance": "squared"},
        "either",
        needs_reward=False,
        particles=False,
    ),
}
"""Methods by name."""

REWARDS: Mapping[str, str] = {
    "class": "class:8 or class:0+2+4, log-probability by the classifier of the bundled digit models",
    "clip": "clip:TEXT, or clip@MODEL:TEXT with a folder or hub id of CLIP",
    "compressibility": "compressibility:png or :jpeg, minus the kilobytes of the file",
    "brightness": "brightness, mean of the pixels from 0 to 1",
}
"""Rewards by name, and how they are written."""

_UNSET: Mapping[str, Any] = {"churn": 0.0, "calls": 0, "branching": 0, "classifier": ""}
_CHOICES: Mapping[str, Sequence[str]] = {
    "pick": ("draw", "best"),
    "distance": ("squared", "absolute"),
    "combine": ("sum", "ranks"),
}
_UNBOUNDED = ("scale", "temperature")
_KINDS = {int: "a whole number", float: "a number", str: "text", list: "two numbers, [FACTOR, EXPONENT]"}
_DEFAULT_PARTICLES = 8
_WORD = re.compile(
    r"(?:(?P<weight>[-+]?[\d.]+(?:e[-+]?\d+)?)\*)?(?P<name>[^:@*]+)(?:@(?P<model>[^:]+))?(?::(?P<text>.*))?", re.DOTALL
)


@dataclass(frozen=True)
class RewardWord:
    """A reward as it is written: ``[WEIGHT*]NAME[@MODEL][:TEXT]``."""

    weight: float
    name: str
    model: str | None
    text: str | None


@dataclass(frozen=True)
class Steering:
    """What steers a run.

    Attributes:
        method: of ``METHODS``.
        rewards: as written; their weighted values add up.
        particles: of each image.
        options: of the method, all of them.
    """

    method: str
    rewards: tuple[str, ...]
    particles: int
    options: dict[str, Any]

    @property
    def kind(self) -> Method:
        """The entry of the table."""
        return METHODS[self.method]

    @property
    def chooses_class(self) -> bool:
        """Whether a reward says which class the images shall have, so that the model need not."""
        return any(parse_reward(word).name == "class" for word in self.rewards)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "rewards": list(self.rewards)}

    @classmethod
    def from_json(cls, content: Any) -> Steering:
        """Reads what ``to_json`` made, and checks it.

        Raises:
            ValueError: something else.
        """
        shapes = {"method": str, "rewards": list, "particles": int, "options": dict}
        if (
            not isinstance(content, dict)
            or content.keys() != shapes.keys()
            or not all(type(content[name]) is shape for name, shape in shapes.items())
            or not all(isinstance(word, str) for word in content["rewards"])
        ):
            raise ValueError(f"steering has the unusable value {content!r}")
        steering = cls(content["method"], tuple(content["rewards"]), content["particles"], content["options"])
        check_steering(steering)
        if missing := sorted(steering.kind.options.keys() - steering.options.keys()):
            raise ValueError(f"steering lacks the options {', '.join(missing)} of {steering.method}")
        return steering


def read_steering(method: str, rewards: Sequence[str], particles: int | None, words: Sequence[str]) -> Steering:
    """Steering from the command line, with the defaults of what was not given.

    Raises:
        ValueError: an unknown method, reward or option, or an impossible value.
    """
    if method not in METHODS:
        raise unknown("steer", method, METHODS)
    if particles is None:
        particles = _DEFAULT_PARTICLES if METHODS[method].particles else 1
    given = parse_options(words)
    steering = Steering(method, tuple(rewards), particles, given)
    check_steering(steering)
    return Steering(method, tuple(rewards), particles, {**METHODS[method].options, **given})


def check_steering(steering: Steering) -> None:
    """What can be checked without the model.

    Raises:
        ValueError: an unknown method, reward or option, or an impossible value.
    """
    if steering.method not in METHODS:
        raise unknown("steer", steering.method, METHODS)
    kind = steering.kind
    for word in steering.rewards:
        parse_reward(word)
    if kind.needs_reward and not steering.rewards:
        raise ValueError(
            f"steer {steering.method} needs a reward: give --reward, such as {'; '.join(REWARDS.values())}"
        )
    if steering.particles < 1:
        raise ValueError(f"particles {steering.particles} is less than 1")
    if steering.particles > 1 and not kind.particles:
        raise ValueError(f"particles {steering.particles} does not apply: {steering.method} steers one sample an image")
    for name, value in steering.options.items():
        if name not in kind.options:
            raise unknown(f"steer-option of {steering.method}", name, kind.options)
        _check_option(name, value, kind.options[name])
    if steering.options.get("combine") == "ranks" and len(steering.rewards) < 2:
        raise ValueError("steer-option combine='ranks' is for several rewards: give --reward more than once")


def _check_option(name: str, value: Any, default: Any) -> None:
    if name in _UNSET:
        if value is None:
            return
        default = _UNSET[name]
    if name in _UNBOUNDED and value == "inf":
        return
    kind = type(default)
    allowed = (int, float) if kind is float else kind
    fits = isinstance(value, allowed) and not isinstance(value, bool)
    if kind is list and fits:
        fits = len(value) == len(default) and all(type(entry) in (int, float) for entry in value)
    if not fits:
        raise ValueError(f"steer-option {name}={value!r} must be {_KINDS[kind]}")
    if name in ("rounds", "calls") and value < 1:
        raise ValueError(f"steer-option {name}={value!r} must be at least 1")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise unknown(f"steer-option {name}", value, _CHOICES[name])


def parse_reward(word: str) -> RewardWord:
    """A reward's parts.

    Raises:
        ValueError: an unknown reward, or one without its text or with one too much.
    """
    match = _WORD.fullmatch(word)
    if match is None or match["name"] not in REWARDS:
        raise unknown("reward", word if match is None else match["name"], REWARDS)
    try:
        weight = 1.0 if match["weight"] is None else float(match["weight"])
    except ValueError:
        weight = math.nan
    name, model, text = match["name"], match["model"], match["text"]
    usage = f"write {REWARDS[name]}"
    if not math.isfinite(weight):
        raise ValueError(f"reward {word!r} has a weight that is no finite number; write such as 0.5*{name}")
    if model is not None and name != "clip":
        raise ValueError(f"reward {word!r} takes no model; {usage}")
    if name == "brightness" and text is not None:
        raise ValueError(f"reward {word!r} takes no text; {usage}")
    if name == "clip" and not (text or "").strip():
        raise ValueError(f"reward {word!r} has no text; {usage}")
    if name == "compressibility" and text not in ("png", "jpeg"):
        raise ValueError(f"reward {word!r} names no format; {usage}")
    if name == "class" and re.fullmatch(r"[0-9](?:\+[0-9])*", text or "") is None:
        raise ValueError(f"reward {word!r} names no digits from 0 to 9; {usage}")
    return RewardWord(weight, name, model, text)


def number(value: float | str) -> float:
    """An option's number; infinity stands as text in records, since JSON lacks it."""
    return float(value)
