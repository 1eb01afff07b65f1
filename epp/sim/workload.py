"""Who asks what and when: one workload type for the demo, the load client and the simulator.

In: a seed, a duration, a rate. Out: `Arrival`s in the order of time.
Rules here:
- Open loop: arrivals are a Poisson process, or as even or bursty as a tenant says, and wait for nobody's answer. The
  next turn of a chat or an agent comes a while after this one, with the answer that every simulated server gives
  (`text.words`), whether it has come by then or not.
- Every tenant draws from its own generator: adding one changes nothing for the others.
- Lengths are exact, in tokens of 4 bytes, what the chat template adds included.
- Chats and agents begin before the start, so that all their turns are as frequent in the first second as in the last.
- Text is made when it is asked for: what is held is that of the sessions that are under way.
Rejected: a closed loop (so many users, each waits for its answer): a slow system is then asked less, which flatters it.
Source: the shape of `Prompts` is the shared-prefix generator of inference-perf, which made llm-d's published results;
`Agents` has the measures that llm-d's blog of 2026-07-22 gives of 219 coding agents' sessions.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import accumulate, count, cycle
from random import Random
from statistics import NormalDist
from typing import Final, Literal

import msgspec

from epp.sim import text


class Arrival(msgspec.Struct, frozen=True):
    """One request of a workload."""

    at: float
    """Seconds from the start."""
    tenant: str
    model: str
    messages: tuple[tuple[str, str], ...]
    """(role, content)."""
    max_tokens: int
    session: str
    """What shares a prefix: a group of prompts, or a chat."""
    turn: int = 0
    """Of a chat or an agent, from 0."""


class Spread(msgspec.Struct, frozen=True):
    """How lengths differ: each is what the tenant says times one draw. All in parts of that."""

    kind: Literal["normal", "lognormal", "uniform"]
    deviation: float
    """Standard deviation; of uniform: not looked at."""
    least: float
    most: float
    """What is drawn beyond these is these."""

    def draw(self, rng: Random) -> float:
        if self.kind == "uniform":
            return rng.uniform(self.least, self.most)
        if self.kind == "normal":
            drawn = rng.gauss(1.0, self.deviation)
        else:
            sigma = math.sqrt(math.log(1 + self.deviation**2))  # a log-normal whose mean is 1
            drawn = rng.lognormvariate(-(sigma**2) / 2, sigma)
        return min(max(drawn, self.least), self.most)


class Prompts(msgspec.Struct, frozen=True):
    """Groups of prompts: those of one group begin with the same long text. All are asked again and again, equally."""

    tenant: str
    share: float
    """Share of the workload's requests, 0..1."""
    groups: int
    questions: int
    """Prompts a group; 0: every request is a new one."""
    shared_tokens: int
    """0: nothing is shared."""
    question_tokens: int
    output_tokens: int
    models: tuple[str, ...] = ()
    """Model or adapter of group 0, 1, …, and again from the first; empty: the workload's model."""
    in_turn: bool = False
    """Every prompt is asked once before any is asked again, in one shuffled order: inference-perf's way. Else each is
    drawn by itself. Needs `questions`."""
    variation: float = 1.0
    """Coefficient of variation of the time between two requests. 0: even; 1: Poisson; more: bursts (Gamma)."""
    skew: float = 0.0
    """How much more often the first groups are asked: group n by 1 / (n + 1)^skew (Zipf). 0: all alike. Not looked at
    where prompts come in turn."""
    shared_spread: Spread | None = None
    """How the groups' shared texts differ in length. None: not at all."""
    question_spread: Spread | None = None
    output_spread: Spread | None = None
    """How the prompts of a group differ, each the same whenever it is asked."""

    def arrivals(self, rng: Random, rate: float, duration: float, model: str, tag: str) -> Iterator[Arrival]:
        prompts = self._prompts(rng, model, tag)
        at = gap(rng, rate, self.variation)
        while at < duration:
            asks, session, messages, output = next(prompts)
            yield Arrival(at, self.tenant, asks, messages, output, session)
            at += gap(rng, rate, self.variation)

    def _prompts(self, rng: Random, model: str, tag: str) -> Iterator[_Prompt]:
        """One request after the other."""
        if self.in_turn:
            every = [(group, asked) for group in range(self.groups) for asked in range(self.questions)]
            rng.shuffle(every)
            yield from (self._prompt(group, asked, model, tag) for group, asked in cycle(every))
        weights = list(accumulate((number + 1) ** -self.skew for number in range(self.groups)))
        for number in count():
            (group,) = (
                rng.choices(range(self.groups), cum_weights=weights) if self.skew else (rng.randrange(self.groups),)
            )
            asked = rng.randrange(self.questions) if self.questions else number
            yield self._prompt(group, asked, model, tag)

    def _prompt(self, group: int, asked: int, model: str, tag: str) -> _Prompt:
        name = f"{tag}-{self.tenant}-{group}"
        asks = self.models[group % len(self.models)] if self.models else model
        output = _length(self.output_tokens, self.output_spread, f"{name}-{asked} output", least=1)
        return asks, name, self._messages(name, asked), output

    def _messages(self, name: str, asked: int) -> tuple[tuple[str, str], ...]:
        one = f"{name}-{asked}"
        question = _length(self.question_tokens, self.question_spread, f"{one} question", least=_ENDS + 1) - _ENDS
        asks = ("user", _filler(one, question))
        if not self.shared_tokens:
            return (asks,)
        header = _HEADER["system"]
        shared = _length(self.shared_tokens, self.shared_spread, f"{name} shared", least=header + 1) - header
        return ("system", _filler(name, shared)), asks


_Prompt = tuple[str, str, tuple[tuple[str, str], ...], int]
"""Model, session, messages and tokens of the answer."""


class Chats(msgspec.Struct, frozen=True):
    """Conversations: each turn sends everything said so far. All of a tenant begin with the same system message."""

    tenant: str
    share: float
    """Share of the workload's requests, 0..1."""
    turns: int
    think_time: float
    """Mean seconds between two turns of a chat, the answer's time included; exponential."""
    system_tokens: int
    user_tokens: int
    """Of each turn."""
    output_tokens: int
    models: tuple[str, ...] = ()
    """Model or adapter of chat 0, 1, …, and again from the first; empty: the workload's model."""
    variation: float = 1.0
    """Coefficient of variation of the time between two chats' first turns, as of `Prompts`."""

    def arrivals(self, rng: Random, rate: float, duration: float, model: str, tag: str) -> Iterator[Arrival]:
        system = _filler(f"{tag}-{self.tenant}", self.system_tokens - _HEADER["system"])
        turns: list[tuple[float, int, int, tuple[tuple[str, str], ...]]] = []
        begins, number = -2 * self.turns * self.think_time, 0
        while True:
            begins += gap(rng, rate / self.turns, self.variation)
            while turns and turns[0][0] < begins:
                at, chat, turn, messages = heapq.heappop(turns)
                if at >= duration:
                    return
                session = f"{tag}-{self.tenant}-{chat}"
                messages += (("user", self._says(session, turn)),)
                if at >= 0:
                    asks = self.models[chat % len(self.models)] if self.models else model
                    yield Arrival(at, self.tenant, asks, messages, self.output_tokens, session, turn)
                if turn + 1 < self.turns:
                    messages += (("assistant", text.words(0, self.output_tokens)),)
                    pause = rng.expovariate(1 / self.think_time)
                    heapq.heappush(turns, (at + pause, chat, turn + 1, messages))
            heapq.heappush(turns, (begins, number, 0, (("system", system),)))
            number += 1

    def _says(self, session: str, turn: int) -> str:
        """The first words of a chat set it apart; later ones need not."""
        return _filler(f"{session}-{turn}", self.user_tokens - _ENDS)


class _Session(msgspec.Struct):
    """An agent at work."""

    name: str
    model: str
    tokens: int
    """Of the next prompt, but for the result that comes with it."""
    messages: tuple[tuple[str, str], ...]
    turn: int = 0


class Agents(msgspec.Struct, frozen=True):
    """Coding agents and their like: a session sends all of itself again and again, each time with the result of what
    the model wanted done. What grows too long is compacted: a summary takes the place of all but the instructions."""

    tenant: str
    share: float
    """Share of the workload's requests, 0..1."""
    turns: int
    gap_p50: float
    gap_p99: float
    """Seconds from an answer to the next turn: the tool's time, or the person's; log-normal."""
    answer_time: float
    """Seconds that an answer is thought to take. Agents wait for it; an open loop cannot, and takes this."""
    system_tokens: int
    """Instructions and tools, the same in every session."""
    task_tokens: int
    """What a session begins with besides, and what a compaction leaves."""
    limit_tokens: int
    """A prompt that would be longer is compacted."""
    result_p50: int
    result_p99: int
    """Tokens of what a tool says; log-normal."""
    output_tokens: int
    models: tuple[str, ...] = ()
    """Model or adapter of session 0, 1, …, and again from the first; empty: the workload's model."""
    variation: float = 1.0
    """Coefficient of variation of the time between two sessions' first turns, as of `Prompts`."""

    @property
    def life(self) -> float:
        """Mean seconds of a session."""
        sigma = _sigma(self.gap_p50, self.gap_p99)
        return self.turns * (self.answer_time + self.gap_p50 * math.exp(sigma**2 / 2))

    def arrivals(self, rng: Random, rate: float, duration: float, model: str, tag: str) -> Iterator[Arrival]:
        system = ("system", _filler(f"{tag}-{self.tenant}", self.system_tokens - _HEADER["system"]))
        sigma = _sigma(self.gap_p50, self.gap_p99)
        due: list[tuple[float, int, _Session]] = []
        begins = -2 * self.life
        for number in count():
            begins += gap(rng, rate / self.turns, self.variation)
            while due and due[0][0] < begins:
                at, order, session = heapq.heappop(due)
                if at >= duration:
                    return
                self._ask(rng, session, system)
                if at >= 0:
                    yield self._arrival(at, session)
                session.turn += 1
                if session.turn < self.turns:
                    pause = self.answer_time + rng.lognormvariate(math.log(self.gap_p50), sigma)
                    heapq.heappush(due, (at + pause, order, session))
            asks = self.models[number % len(self.models)] if self.models else model
            heapq.heappush(due, (begins, number, _Session(f"{tag}-{self.tenant}-{number}", asks, 0, ())))

    def _ask(self, rng: Random, session: _Session, system: tuple[str, str]) -> None:
        """Make the messages of this turn: the result of a tool behind all that was said, or a beginning."""
        spread = _sigma(self.result_p50, self.result_p99)
        result = max(_ENDS + 1, round(rng.lognormvariate(math.log(self.result_p50), spread)))
        name = f"{session.name}-{session.turn}"
        session.tokens += self.output_tokens + result
        if session.turn and session.tokens <= self.limit_tokens:
            answer = ("assistant", text.words(0, self.output_tokens))
            session.messages += (answer, ("user", _filler(name, result - _ENDS)))
        else:
            session.tokens = self.system_tokens + self.task_tokens
            session.messages = (system, ("user", _filler(name, self.task_tokens - _ENDS)))

    def _arrival(self, at: float, session: _Session) -> Arrival:
        return Arrival(at, self.tenant, session.model, session.messages, self.output_tokens, session.name, session.turn)


class Workload(msgspec.Struct, frozen=True):
    """Several tenants that ask at the same time."""

    name: str
    model: str
    """Name of the base model."""
    rate: float
    """Requests a second of all tenants together, for which the workload was made."""
    tenants: tuple[Prompts | Chats | Agents, ...]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Every LoRA adapter that is asked for, sorted."""
        return tuple(sorted({model for tenant in self.tenants for model in tenant.models} - {self.model}))

    def arrivals(self, seed: int, duration: float = math.inf, rate: float | None = None) -> Iterator[Arrival]:
        """Requests of all tenants in the order of time.

        Args:
            seed: same seed, same arrivals.
            duration: seconds; the last arrival is before it.
            rate: requests a second of all tenants together; None: the workload's own.
        """
        rate = self.rate if rate is None else rate
        return heapq.merge(
            *(
                tenant.arrivals(Random(f"{seed}/{tenant.tenant}"), rate * tenant.share, duration, self.model, f"{seed}")
                for tenant in self.tenants
                if tenant.share > 0
            ),
            key=lambda arrival: arrival.at,
        )


def gap(rng: Random, rate: float, variation: float) -> float:
    """Seconds to the next arrival.

    Args:
        variation: coefficient of variation. 0: even; 1: Poisson; else Gamma.
    """
    if variation == 1.0:
        return rng.expovariate(rate)
    squared = variation**2
    return rng.gammavariate(1 / squared, squared / rate) if squared else 1 / rate


def _sigma(p50: float, p99: float) -> float:
    """Of the log-normal with these percentiles."""
    return math.log(p99 / p50) / _P99


def _length(tokens: int, spread: Spread | None, of: str, least: int) -> int:
    """One length: the same for the same text."""
    return tokens if spread is None else max(least, round(tokens * spread.draw(Random(of))))


def _filler(tag: str, tokens: int) -> str:
    return text.filler(tag, tokens * text.TOKEN_BYTES)


_HEADER: Final = {role: text.count_tokens(text.header(role)) for role in ("system", "user", "assistant")}
_ENDS: Final = _HEADER["user"] + _HEADER["assistant"]
"""What is around the last message of a prompt."""
_P99: Final = NormalDist().inv_cdf(0.99)

DEMO: Final = Workload(
    "demo",
    model="qwen3-32b",
    rate=28.0,
    tenants=(
        Prompts("search", 0.75, groups=75, questions=5, shared_tokens=300, question_tokens=60, output_tokens=25),
        Chats("chat", 0.15, turns=4, think_time=3.0, system_tokens=100, user_tokens=30, output_tokens=25),
        Prompts(
            "adapters",
            0.10,
            groups=8,
            questions=5,
            shared_tokens=150,
            question_tokens=50,
            output_tokens=25,
            models=("legal", "medical", "sql", "support"),
        ),
    ),
)
"""The published 73-capacity workload of llm-d for four servers of the `demo` profile, plus chats and LoRA adapters.

Published: 8 servers of 307,328 KV tokens; 150 groups x 5 prompts of 6,000 shared + 1,200 own tokens, 500 out; all
prompts together, 150 x (6,000 + 5 x 1,200), are 73 % of the fleet's KV cache.
Here: 4 servers, so half the groups; a twentieth of the tokens; 75 x (300 + 5 x 60) tokens are 73 % of 4 x 15,360.
A quarter of the requests is not of that workload: chats of four turns, and prompts for four adapters, of which a
server runs two at a time.
"""

NO_SHARING: Final = Workload(
    "no-sharing",
    model="qwen3-32b",
    rate=10.0,
    tenants=(
        Prompts("short", 0.8, groups=1, questions=0, shared_tokens=0, question_tokens=50, output_tokens=25),
        Prompts("long", 0.2, groups=1, questions=0, shared_tokens=0, question_tokens=400, output_tokens=25),
    ),
)
"""Every prompt is new: there is nothing to gain from prefixes, and four servers of the `demo` profile are calm. Four
in five prompts are short, so the 90th percentile of the time to the first token is that of a middling long one."""

BUILT_IN: Final = {workload.name: workload for workload in (DEMO, NO_SHARING)}
