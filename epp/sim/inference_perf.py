"""inference-perf's configuration, read as a workload: what is asked, and in which stages.

In: a YAML file that inference-perf would run. Out: a `Workload` and its `Stage`s, and what was not looked at.
Rules here:
- `data.type: shared_prefix` and `load.type: constant` or `poisson` are read, by their old and their new
  names. Whatever else decides what is asked or when is an error at its line, never left out in silence.
- Who is asked, and how it is measured (`api`, `server` but for `model_name`, `tokenizer`, `metrics`, `report`,
  `storage`, workers and time-outs of `load`), is not looked at: that is what flags are for.
- Both load types are Poisson arrivals here. inference-perf's `constant` spreads a stage's requests at random over it.
- Prompts are shuffled once and asked in turn, as there. There each stage begins with the first of them again; here
  stages go on where the one before ended.
- A prompt is a system and a user message. There it is one text for `/v1/completions`, of as many tokens.
Rejected: `enable_multi_turn_chat`, whose users wait for their answers: a closed loop.
Source: kubernetes-sigs/inference-perf 0.1.1 and 0.2.0 (as installed), and its config package of 2026.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import yaml
from msgspec import Meta

from epp.config.document import At, ConfigErrors, Document, did_you_mean
from epp.errors import ConfigError
from epp.sim import text
from epp.sim.traces import MOST_TOKENS, TEMPLATE_TOKENS
from epp.sim.workload import Prompts, Spread, Workload
from epp.sim.world import Stage

SUFFIXES: Final = (".yaml", ".yml")
GROUPS: Final = ("num_groups", "num_unique_system_prompts")
PROMPTS: Final = ("num_prompts_per_group", "num_users_per_system_prompt")
"""Of a group; each under its old name and its new one."""

Count = Annotated[int, Meta(ge=1)]
Tokens = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]
Number = Annotated[float, Meta(ge=0, le=MOST_TOKENS)]
Variance = Annotated[float, Meta(ge=0, le=MOST_TOKENS**2)]
Over0 = Annotated[float, Meta(gt=0, le=1e9)]
MOST_PROMPTS: Final = 1_000_000
"""Of all groups together."""

_DATA: Final = ("type", "shared_prefix", "path", "input_distribution", "output_distribution", "trace")
_SHARED: Final = (
    *GROUPS,
    *PROMPTS,
    "system_prompt_len",
    "question_len",
    "output_len",
    "question_distribution",
    "output_distribution",
    "enable_multi_turn_chat",
    "seed",
)
_LOAD_UNUSED: Final = (
    "interval",
    "num_workers",
    "worker_max_concurrency",
    "worker_max_tcp_connections",
    "circuit_breakers",
    "request_timeout",
    "request_retries",
    "request_retry_backoff_sec",
    "stage_teardown_grace_seconds",
    "base_seed",
    "trace",
)
_LOAD: Final = ("type", "stages", "sweep", "lora_traffic_split", *_LOAD_UNUSED)
_DISTRIBUTION: Final = ("type", "mean", "std_dev", "variance", "min", "max", "total_count")


class Length(msgspec.Struct, frozen=True):
    """How long texts are."""

    tokens: int
    """On average, before the longest and the shortest are cut off."""
    spread: Spread | None = None


class Read(msgspec.Struct, frozen=True):
    """What a file says."""

    source: Workload
    stages: tuple[Stage, ...]
    """At least one, none of them a warm-up."""
    about: str
    """In a sentence; with what was not looked at."""


def read_config(path: str) -> Read:
    """Read a file.

    Raises:
        ConfigErrors: it is no configuration of inference-perf, or asks for what cannot be done here.
        ConfigError: it cannot be read.
    """
    try:
        document = Document(Path(path).read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=path) from error
    read = None if document.root is None else _Reader(document).everything(document.root)
    if read is None:
        raise ConfigErrors(document.errors or [ConfigError("this file is empty", file=path)])
    return read


class _Reader:
    """One file while it is read. What is wrong collects in the document, and values stand in for it."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._unused: list[str] = []

    def everything(self, root: At) -> Read | None:
        """None: something was reported."""
        sections = self._fields(root, _names(root) or ("data", "load", "server"))
        for name in ("data", "load"):
            if name not in sections:
                self._document.complain(root, f"{name} is missing: this is no configuration of inference-perf")
        self._unused += [name for name in sections if name not in ("data", "load", "server")]
        prompts = self._prompts(sections["data"]) if "data" in sections else None
        stages, splits = self._load(sections["load"]) if "load" in sections else ((), {})
        model = self._model(sections.get("server"))
        if self._document.errors or prompts is None:
            return None
        tenants = [
            msgspec.structs.replace(
                prompts, tenant=_ascii(adapter) or prompts.tenant, share=share, models=(adapter,) * bool(adapter)
            )
            for adapter, share in (splits or {"": 1.0}).items()
        ]
        name = Path(self._document.file).stem
        workload = Workload(name, model, max(stage.rate for stage in stages), tuple(tenants))
        return Read(workload, stages, self._about(prompts))

    def _about(self, prompts: Prompts) -> str:
        shape = f"{prompts.groups} groups x {prompts.questions} prompts of {prompts.shared_tokens:,} shared"
        told = f"{shape} + {prompts.question_tokens:,} tokens, {prompts.output_tokens:,} of answer (inference-perf)"
        return f"{told}; not looked at: {', '.join(self._unused)}" if self._unused else told

    # -- data --------------------------------------------------------------------------------------------------------

    def _prompts(self, at: At) -> Prompts | None:
        fields = self._fields(at, _DATA)
        kind = fields.get("type")
        if kind is None or self._document.value(kind, str) != "shared_prefix":
            told = "type must be shared_prefix; recorded requests are sent with --trace FILE instead"
            self._document.complain(kind or at, told)
            return None
        self._unused += [f"data.{name}" for name in fields if name not in ("type", "shared_prefix")]
        if "shared_prefix" not in fields:
            self._document.complain(at, "shared_prefix is missing: how many groups, and how long prompts are")
            return None
        return self._shared(fields["shared_prefix"])

    def _shared(self, at: At) -> Prompts:
        fields = self._fields(at, _SHARED)
        chats = fields.get("enable_multi_turn_chat")
        if chats is not None and self._document.value(chats, bool):
            told = "its users wait for their answers, which an open loop does not; built-in workloads have chats"
            self._document.complain(chats, told)
        if "seed" in fields:
            self._unused.append("data.shared_prefix.seed")
        shared = self._length(fields, "system_prompt_len", 100, _SYSTEM, or_none=True)
        question = self._length(fields, "question_len", 50, TEMPLATE_TOKENS)
        output = self._length(fields, "output_len", 50, 0)
        groups, questions = self._count(fields, GROUPS), self._count(fields, PROMPTS)
        if groups * questions > MOST_PROMPTS:
            self._document.complain(at, f"{groups * questions:,} prompts are too many: at most {MOST_PROMPTS:,}")
        return Prompts(
            "users",
            1.0,
            groups=groups,
            questions=questions,
            shared_tokens=shared.tokens,
            question_tokens=question.tokens,
            output_tokens=output.tokens,
            in_turn=True,
            shared_spread=shared.spread,
            question_spread=question.spread,
            output_spread=output.spread,
        )

    def _count(self, fields: Mapping[str, At], names: tuple[str, str]) -> int:
        given = [fields[name] for name in names if name in fields]
        if len(given) > 1:
            self._document.complain(given[1], f"{names[0]} and {names[1]} are the same: give one of them")
        return (self._document.value(given[0], Count) or 1) if given else 10

    def _length(self, fields: Mapping[str, At], name: str, default: int, over: int, *, or_none: bool = False) -> Length:
        """A number of tokens, or a distribution of it.

        Args:
            over: it must be longer than this: what the chat template adds.
            or_none: 0 is right too: there is no such text.
        """
        older = fields.get(f"{name.removesuffix('_len')}_distribution")
        at = fields.get(name)
        if older is not None and (at is None or isinstance(at.node, yaml.ScalarNode)):
            at = older
        if at is None:
            return Length(default)
        if not isinstance(at.node, yaml.ScalarNode):
            length = self._distribution(at)
        else:
            length = Length(self._document.value(at, Tokens) or 0)
        if length.tokens <= over and not (or_none and length.tokens == 0) and not self._is_wrong(at):
            self._document.complain(at, f"must be over {over} tokens, which is what the chat template adds")
        return length

    def _distribution(self, at: At) -> Length:
        fields = self._fields(at, _DISTRIBUTION)
        kind = self._word(fields.get("type"), (*_KINDS, "fixed")) or "normal"
        mean, deviation = self._number(fields, "mean", 512.0), self._number(fields, "std_dev", 200.0)
        least, most = self._number(fields, "min", 10.0), self._number(fields, "max", 1024.0)
        if "variance" in fields:
            deviation = math.sqrt(self._document.value(fields["variance"], Variance) or 0.0)
        if least > most and not self._is_wrong(at):
            self._document.complain(at, f"min ({least:g}) must not be over max ({most:g})")
        if kind == "uniform":
            mean = (least + most) / 2
        if mean <= 0:
            self._document.complain(at, "mean must be over 0")
            return Length(1)
        if kind == "fixed" or (kind != "uniform" and not deviation):
            return Length(round(mean))
        spread = Spread(_KINDS[kind], deviation / mean, least / mean, most / mean)
        return Length(round(mean), spread)

    def _number(self, fields: Mapping[str, At], name: str, default: float) -> float:
        return (self._document.value(fields[name], Number) or 0.0) if name in fields else default

    def _word(self, at: At | None, choices: Collection[str]) -> str | None:
        """One of these; anything else is reported. None: it is not written, or wrong."""
        word = None if at is None else self._document.text(at)
        if at is None or word in choices or word is None:
            return word
        self._document.complain(at, f"{word} cannot be sent here{did_you_mean(word, choices)}: {' or '.join(choices)}")
        return None

    # -- load --------------------------------------------------------------------------------------------------------

    def _load(self, at: At) -> tuple[tuple[Stage, ...], dict[str, float]]:
        """Stages, and the share of each adapter; none: everybody asks for the base model."""
        fields = self._fields(at, _LOAD)
        self._word(fields.get("type"), ("constant", "poisson"))
        if "sweep" in fields:
            told = "a sweep looks for the rates itself: write the stages that it found, or use --rate"
            self._document.complain(fields["sweep"], told)
        self._unused += [f"load.{name}" for name in fields if name in _LOAD_UNUSED]
        stages = tuple(self._stage(each) for each in self._document.items(fields.get("stages")))
        if not stages and "sweep" not in fields:
            self._document.complain(at, "stages is missing: a list of rate and duration")
        return stages, self._splits(fields.get("lora_traffic_split"))

    def _stage(self, at: At) -> Stage:
        fields = self._fields(at, ("rate", "duration", "num_requests", "concurrency_level"))
        for name in ("num_requests", "concurrency_level"):
            if name in fields:
                self._document.complain(
                    fields[name], "users that wait for answers are not sent: give rate and duration"
                )
        found = {}
        for name in ("rate", "duration"):
            if name not in fields:
                self._document.complain(at, f"{name} is missing")
            found[name] = (self._document.value(fields[name], Over0) if name in fields else None) or 1.0
        return Stage(found["rate"], found["duration"])

    def _splits(self, at: At | None) -> dict[str, float]:
        splits: dict[str, float] = {}
        for each in self._document.items(at):
            fields = self._fields(each, ("name", "split"))
            name = self._document.text(fields["name"]) if "name" in fields else None
            split = self._document.value(fields["split"], Number) if "split" in fields else None
            if name is None or split is None:
                self._document.complain(each, "name and split are required")
            else:
                splits[name] = splits.get(name, 0.0) + split
        if at is not None and not math.isclose(sum(splits.values()), 1.0, abs_tol=1e-6):
            self._document.complain(at, f"splits must add up to 1, not to {sum(splits.values()):g}")
        return splits

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _model(self, server: At | None) -> str:
        named = {} if server is None else self._fields(server, _names(server))
        self._unused += [f"server.{name}" for name in named if name != "model_name"]
        return (self._document.text(named["model_name"]) if "model_name" in named else None) or "qwen3-32b"

    def _fields(self, at: At, known: Collection[str]) -> dict[str, At]:
        return self._document.fields(at, known) or {}

    def _is_wrong(self, at: At) -> bool:
        return any(error.path == at.path or error.path.startswith(f"{at.path}.") for error in self._document.errors)


def _names(at: At) -> list[str]:
    """Of a mapping's fields, whichever they are."""
    return [str(key.value) for key, _ in at.node.value] if isinstance(at.node, yaml.MappingNode) else []


def _ascii(name: str) -> str:
    """A name that prompts can begin with: four bytes are a token, so other letters would make them longer."""
    return ascii(name)[1:-1]


_KINDS: Final[dict[str, Literal["normal", "lognormal", "uniform"]]] = {
    "normal": "normal",
    "lognormal": "lognormal",
    "uniform": "uniform",
}
_SYSTEM: Final = text.count_tokens(text.header("system"))
