"""Workloads with all that makes a result of them: stages of load, a fleet, and what was published of it.

In: a name, maybe a trace file; or a configuration file of inference-perf. Out: a `Scenario`.
Rules here: parameters are the published ones, and each that was not published says so. Answers have 500 tokens in the
two published ladders, which is what others simulate them with. 1,000 were asked for in both, without an end before
that: `--output-tokens 1000` is nearer to what was published (docs/simulator.md).
Source: llm-d-kv-cache `benchmarking/73-capacity` and `37-capacity` (workload, ladder and result of each stage); llm-d's
blog of 2026-08-17 for b2b-saas and code-generation (lengths and loads, but not what is shared); the FAST'25 trace of
Mooncake, eight servers as in NVIDIA Dynamo's guide; llm-d's blog of 2026-03-13 for bursty, of 2026-07-22 for agentic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from epp.errors import ConfigError
from epp.sim.fleet import STEADY, Changes, Failure
from epp.sim.inference_perf import SUFFIXES, read_config
from epp.sim.traces import Trace, read_trace
from epp.sim.workload import DEMO, Agents, Prompts, Workload
from epp.sim.world import Stage


class Scenario(msgspec.Struct, frozen=True):
    """What is tried with every policy."""

    name: str
    about: str
    source: Workload | Trace
    stages: tuple[Stage, ...]
    engine: str
    """Name of a profile, or a file."""
    servers: int
    waits: bool = True
    """A stage begins when all of the one before it is answered, as inference-perf has it. Else stages are steps of one
    load, which goes up and down."""
    changes: Changes = STEADY
    """What becomes of the servers."""
    is_file: bool = False
    """`about` is what was read of a file, and what was not."""


QWEN: Final = "qwen3-32b-h100-tp2"
LLAMA: Final = "llama-70b-h100-tp4"


def ladder(warm_up: tuple[float, float], *steps: tuple[float, float]) -> tuple[Stage, ...]:
    """Rates and seconds, the warm-up first."""
    return Stage(*warm_up, warm_up=True), *(Stage(*step) for step in steps)


CAPACITY_73: Final = Scenario(
    "73-capacity",
    "150 groups x 5 prompts of 6,000 shared + 1,200 tokens: 73 % of eight servers' KV cache; 3 to 60 requests a second",
    Workload("73-capacity", "qwen3-32b", 60.0, (Prompts("users", 1.0, 150, 5, 6000, 1200, 500, in_turn=True),)),
    ladder(
        (15, 50),
        *((3, 20), (10, 20), (15, 20), (20, 38), (22, 34), (25, 30), (30, 25), (35, 21)),
        *((40, 38), (43, 36), (46, 33), (49, 30), (52, 29), (55, 27), (57, 26), (60, 25)),
    ),
    QWEN,
    8,
)
CAPACITY_37: Final = Scenario(
    "37-capacity",
    "83 groups x 3 prompts of 8,000 shared + 1,000 tokens, 37 % of what four servers hold; 3 to 20 requests a second",
    Workload("37-capacity", "llama-70b", 20.0, (Prompts("users", 1.0, 83, 3, 8000, 1000, 500, in_turn=True),)),
    ladder(
        (9, 30),
        *((3, 210), (4, 180), (5, 120), (6, 120), (8, 90), (10, 70), (12, 60), (15, 50), (20, 50)),
    ),
    LLAMA,
    4,
)
B2B_SAAS: Final = Scenario(
    "b2b-saas",
    "prompts of 2,400 tokens, 2,000 of them one of 400 tenants' instructions: computing prompts is what saturates",
    # Published: 18 to 38 requests a second at 45,000 to 90,000 prompt tokens a second, which is 2,400 a request. Ours:
    # how many tenants there are, what part is shared, and 250 tokens of answer.
    Workload("b2b-saas", "qwen3-32b", 30.0, (Prompts("tenants", 1.0, 400, 0, 2000, 400, 250),)),
    ladder((15, 60), (18, 60), (30, 60), (38, 60), (60, 60)),
    QWEN,
    8,
)
CODE_GENERATION: Final = Scenario(
    "code-generation",
    "prompts of 70,000 tokens, 64,000 of them one of 25 repositories, 800 tokens of answer; ten servers",
    # Published: 70,000 in, 800 out, ten servers. Ours: 25 repositories and what of a prompt is theirs.
    Workload("code-generation", "qwen3-32b", 0.6, (Prompts("repositories", 1.0, 25, 0, 64000, 6000, 800),)),
    ladder((0.2, 300), (0.3, 300), (0.6, 300), (1.0, 300)),
    QWEN,
    10,
)
NO_SHARING: Final = Scenario(
    "no-sharing",
    "every prompt is new, four in five have 1,000 tokens and one has 8,000: nothing to gain, and much to lose",
    Workload(
        "no-sharing",
        "qwen3-32b",
        20.0,
        (Prompts("short", 0.8, 1, 0, 0, 1000, 500), Prompts("long", 0.2, 1, 0, 0, 8000, 500)),
    ),
    ladder((10, 20), (10, 60), (20, 60), (30, 60), (40, 60)),
    QWEN,
    8,
)
BURSTY: Final = Scenario(
    "bursty",
    "5 and 25 requests a second by turns, 30 s each; prompts of 8,000 tokens, 7,500 of them one of 40 groups'",
    # Published: bursts between 1 and 5 requests a second, 94 % of prompt tokens found in a cache; a 480B model on 13
    # servers of 8 H200. Ours: five times the rates, for eight smaller servers, how long a burst is, all lengths.
    Workload("bursty", "qwen3-32b", 15.0, (Prompts("groups", 1.0, 40, 0, 7500, 500, 360),)),
    (Stage(15, 60, warm_up=True), *(Stage(rate, 30) for rate in (5, 25) * 4)),
    QWEN,
    8,
    waits=False,
)
AGENTIC: Final = Scenario(
    "agentic",
    "coding agents: 107 turns, prompts of 11,000 to 30,000 tokens, of which 95 % of turns bring less than a tenth anew",
    # Published, of 219 sessions: 195,000 tokens in and 317 out (medians); at least 90 % of the prompt used again in
    # 96 % of turns; 2 s between turns (median), 11.4 min (99th percentile); 107 turns (median). Ours: prompts of a
    # tenth, which is what a 32B model's window holds and 110 sessions at once leave room for; a session has always
    # 107 turns; what a tool says; where prompts are compacted; that clients are at their tools 8 s after they asked.
    Workload(
        "agentic",
        "qwen3-32b",
        2.0,
        (
            Agents(
                "agents",
                1.0,
                turns=107,
                gap_p50=2.0,
                gap_p99=684.0,
                answer_time=8.0,
                system_tokens=3000,
                task_tokens=8000,
                limit_tokens=30000,
                result_p50=200,
                result_p99=1200,
                output_tokens=317,
            ),
        ),
    ),
    ladder((2, 150), (1, 150), (2, 150), (4, 75)),
    QWEN,
    8,
)
LORA_MIX: Final = Scenario(
    "lora-mix",
    "a base model and 16 adapters, the first asked 16 times as often as the last; servers run two adapters at a time",
    # Nothing published has rates of adapters. Ours: 40 % ask the base model, Zipf's law for the adapters, all lengths.
    Workload(
        "lora-mix",
        "qwen3-32b",
        20.0,
        (
            Prompts("base", 0.4, 20, 0, 1000, 400, 200),
            Prompts(
                "adapters", 0.6, 16, 0, 1000, 400, 200, models=tuple(f"lora-{at:02}" for at in range(16)), skew=1.0
            ),
        ),
    ),
    ladder((10, 30), (5, 60), (10, 60), (20, 60), (30, 60)),
    QWEN,
    8,
)
DEMO_SHAPE: Final = Scenario(
    "demo",
    "what `epp demo` sends to four small servers: shared prefixes, chats and LoRA adapters, 28 requests a second",
    DEMO,
    ladder((10, 60), (28, 60)),
    "demo",
    4,
)
BUILT_IN: Final = {
    each.name: each
    for each in (
        CAPACITY_73,
        CAPACITY_37,
        B2B_SAAS,
        CODE_GENERATION,
        NO_SHARING,
        BURSTY,
        AGENTIC,
        LORA_MIX,
        DEMO_SHAPE,
    )
}
MOST_REQUESTS: Final = 1_000_000
"""Of a run: about half a gigabyte of what became of them, and some minutes."""
MOST_SECONDS: Final = 7 * 86_400.0
TRACED: Final = {
    "mooncake-conversation": "12,031 requests of Mooncake's chats within an hour, eight servers; needs --trace",
    "trace": "any file of Mooncake's or Azure's form, eight servers; needs --trace",
}
"""Scenarios that are a file, and what they are."""


def scenario(name: str, trace: str = "") -> Scenario:
    """A scenario by its name, or a file of inference-perf's: on eight servers, none of its stages a warm-up.

    Args:
        name: what ends in .yaml or .yml is a file.
        trace: file of the requests, where it needs one.

    Raises:
        ConfigError: there is no such name; it needs a trace, or none; a file cannot be used.
    """
    if name in TRACED:
        if not trace:
            raise ConfigError(f"{name} needs --trace FILE: published traces are not part of this package")
        source = read_trace(trace)
        stage = Stage(source.rate, source.seconds + 1.0)
        return Scenario(name, TRACED[name], source, (stage,), QWEN, 8)
    if trace:
        raise ConfigError(f"--trace goes with {' and '.join(TRACED)}, not with {name}")
    if name.endswith(SUFFIXES):
        read = read_config(name)
        return Scenario(read.source.name, read.about, read.source, read.stages, QWEN, 8, is_file=True)
    if name not in BUILT_IN:
        known = ", ".join((*BUILT_IN, *TRACED))
        raise ConfigError(f"no workload {name!r}: there are {known}, and inference-perf's files (.yaml)")
    return BUILT_IN[name]


def bounded(scenario: Scenario) -> None:
    """Raises ConfigError: more is asked for than a run can hold, or than anybody waits for."""
    seconds = sum(stage.seconds for stage in scenario.stages)
    requests = sum(stage.seconds * stage.rate for stage in scenario.stages)
    if requests > MOST_REQUESTS or seconds > MOST_SECONDS:
        told = f"{scenario.name}: {requests:,.0f} requests in {seconds:,.0f} s are too much for a simulation, "
        told += f"which has {MOST_REQUESTS:,} in a week at most: "
        if isinstance(scenario.source, Trace):
            raise ConfigError(f"{told}cut the trace, look whether its times have the right unit, or send it faster")
        raise ConfigError(f"{told}lower the rates, or make the stages shorter")


def failing(scenario: Scenario, failures: Sequence[Failure]) -> Scenario:
    """The scenario with servers that fail."""
    changes = msgspec.structs.replace(scenario.changes, failures=tuple(failures))
    return msgspec.structs.replace(scenario, changes=changes)


def disaggregated(scenario: Scenario, prefill: int, servers: int) -> Scenario:
    """The scenario with so many servers that only compute prompts. Raises ConfigError: none is left for answers."""
    if not 0 <= prefill < servers:
        raise ConfigError(f"--prefill {prefill}: there are {servers} servers, and one at least must answer")
    return msgspec.structs.replace(scenario, changes=msgspec.structs.replace(scenario.changes, prefill=prefill))


def at_rates(scenario: Scenario, rates: Sequence[str], seconds: float) -> Scenario:
    """The scenario at other rates than its own, after the same warm-up.

    Args:
        rates: requests a second, or with an x behind it times the workload's own rate; commas between several.
        seconds: of each of them; a trace is sent whole. Where stages are steps of one load, of all steps together: each
            rate is their mean, and the steps keep their proportions.

    Raises:
        ConfigError: a rate or a length that is none, or several of a trace, which can be sent only once in a run.
    """
    found = [_rate(one, scenario.source.rate) for each in rates for one in each.split(",")]
    if isinstance(scenario.source, Trace):
        if len(found) != 1:
            raise ConfigError("a trace is sent at one rate: call this once for each")
        stages: tuple[Stage, ...] = (
            Stage(found[0], (scenario.source.seconds + 1.0) * scenario.source.rate / found[0]),
        )
    elif not 0.0 < seconds < float("inf"):
        raise ConfigError(f"--seconds {seconds:g}: a length over 0 is expected")
    else:
        warm_up = tuple(stage for stage in scenario.stages if stage.warm_up)
        stages = warm_up + tuple(stage for rate in found for stage in _steps(scenario, rate, seconds))
    return msgspec.structs.replace(scenario, stages=stages)


def _steps(scenario: Scenario, rate: float, seconds: float) -> tuple[Stage, ...]:
    if scenario.waits:
        return (Stage(rate, seconds),)
    steps = [stage for stage in scenario.stages if not stage.warm_up]
    long = sum(step.seconds for step in steps)
    mean = sum(step.rate * step.seconds for step in steps) / long
    return tuple(Stage(step.rate * rate / mean, step.seconds * seconds / long) for step in steps)


def _rate(text: str, own: float) -> float:
    try:
        rate = float(text.removesuffix("x")) * (own if text.endswith("x") else 1.0)
    except ValueError:
        rate = 0.0
    if not 0.0 < rate < float("inf"):
        raise ConfigError(
            f"--rate {text}: requests a second are expected, or 1.5x for so many times the workload's own"
        )
    return rate
