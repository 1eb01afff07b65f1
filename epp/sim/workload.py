"""Who asks what and when: one workload type for the demo, the load client and the simulator.

In: a seed, a duration, a rate. Out: `Arrival`s in the order of time.
Rules here:
- Open loop: arrivals are a Poisson process, or as even or bursty as a tenant says, and wait for nobody's answer. A
  chat's next turn comes a think time after this one, with the answer that every simulated server gives (`text.words`),
  whether it has come by then or not.
- Every tenant draws from its own generator: adding one changes nothing for the others.
- Lengths are exact, in tokens of 4 bytes, what the chat template adds included.
- Chats begin before the start, so that all turns of a chat are as frequent in the first second as in the last.
Rejected: a closed loop (so many users, each waits for its answer): a slow system is then asked less, which flatters it.
Source: the shape of `Prompts` is the shared-prefix generator of inference-perf, which made llm-d's published results.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import count, cycle
from random import Random
from typing import Final

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
    """Of a chat, from 0."""


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

    def arrivals(self, rng: Random, rate: float, duration: float, model: str, tag: str) -> Iterator[Arrival]:
        prompts = self._prompts(rng, model, tag)
        at = self._gap(rng, rate)
        while at < duration:
            asks, session, messages = next(prompts)
            yield Arrival(at, self.tenant, asks, messages, self.output_tokens, session)
            at += self._gap(rng, rate)

    def _gap(self, rng: Random, rate: float) -> float:
        """Seconds to the next request."""
        if self.variation == 1.0:
            return rng.expovariate(rate)
        squared = self.variation**2
        return rng.gammavariate(1 / squared, squared / rate) if squared else 1 / rate

    def _prompts(self, rng: Random, model: str, tag: str) -> Iterator[tuple[str, str, tuple[tuple[str, str], ...]]]:
        """Model, session and messages of one request after the other."""
        if self.in_turn:
            every = [(group, asked) for group in range(self.groups) for asked in range(self.questions)]
            rng.shuffle(every)
            yield from cycle([self._prompt(group, asked, model, tag) for group, asked in every])
        for number in count():
            group = rng.randrange(self.groups)
            asked = rng.randrange(self.questions) if self.questions else number
            yield self._prompt(group, asked, model, tag)

    def _prompt(self, group: int, asked: int, model: str, tag: str) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        name = f"{tag}-{self.tenant}-{group}"
        asks = self.models[group % len(self.models)] if self.models else model
        return asks, name, self._messages(name, asked)

    def _messages(self, name: str, asked: int) -> tuple[tuple[str, str], ...]:
        question = self.question_tokens - _HEADER["user"] - _HEADER["assistant"]
        asks = ("user", _filler(f"{name}-{asked}", question))
        if not self.shared_tokens:
            return (asks,)
        return ("system", _filler(name, self.shared_tokens - _HEADER["system"])), asks


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

    def arrivals(self, rng: Random, rate: float, duration: float, model: str, tag: str) -> Iterator[Arrival]:
        system = _filler(f"{tag}-{self.tenant}", self.system_tokens - _HEADER["system"])
        turns: list[tuple[float, int, int, tuple[tuple[str, str], ...]]] = []
        begins, number = -2 * self.turns * self.think_time, 0
        while True:
            begins += rng.expovariate(rate / self.turns)
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
        headers = _HEADER["user"] + _HEADER["assistant"]
        return _filler(f"{session}-{turn}", self.user_tokens - headers)


class Workload(msgspec.Struct, frozen=True):
    """Several tenants that ask at the same time."""

    name: str
    model: str
    """Name of the base model."""
    rate: float
    """Requests a second of all tenants together, for which the workload was made."""
    tenants: tuple[Prompts | Chats, ...]

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


def _filler(tag: str, tokens: int) -> str:
    return text.filler(tag, tokens * text.TOKEN_BYTES)


_HEADER: Final = {role: text.count_tokens(text.header(role)) for role in ("system", "user", "assistant")}

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
