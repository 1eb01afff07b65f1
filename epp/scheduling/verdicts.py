"""What a plugin of each kind may answer, and what is wrong with what it did.

In: an instance, a request, candidates, its answer. Out: verdicts; the answer as something that can be compared.
Rules here: an answer is looked at as `profile.py` and `scheduler.py` look at it, but is told why; answers come from
anybody's code, so their types are `object` until they are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Final, Literal

import msgspec
import numpy as np

from epp.dialects.request import Request
from epp.endpoints.table import Candidates, Endpoint, Floats
from epp.errors import NoEndpoint, Refusal
from epp.scheduling.answers import headers_of_answer
from epp.scheduling.decision import Plan, Stage
from epp.scheduling.pickers import max_score
from epp.scheduling.plugin import (
    Admitter,
    Answer,
    Answered,
    Context,
    Decider,
    Filter,
    Handler,
    Instance,
    Picker,
    PrefixMatch,
    Processor,
    Producer,
    RunProfile,
    Scorer,
    Screener,
)
from epp.scheduling.profile import Profile

CLAMPED: Final = "what is outside counts as 0 or 1, so that some differences are lost"
NEUTRAL: Final = (
    "where a value is not known, or all are equal, give a neutral score: lowest_first and with_unknown in "
    "epp.scheduling.scorers do"
)


class Verdict(msgspec.Struct, frozen=True):
    """One thing that is wrong."""

    sort: str
    """In a word; of a plugin's verdicts of a sort only the first is told."""
    severity: Literal["error", "warning"]
    message: str
    """Goes on from the plugin's name: "returned NaN"."""
    advice: str = ""
    """What to do."""


def call(instance: Instance, request: Request, candidates: Candidates) -> object:
    """What it says; a tuple of kinds that are asked more than once. None of kinds that are not in plugin.py."""
    match instance:
        case Scorer():
            return instance.score(request, candidates)
        case Filter():
            return instance.keep(request, candidates)
        case Screener():
            return instance.screen(request, candidates)
        case Producer():
            return instance.match(request, candidates)
        case Picker():
            return tuple(instance.order(request, candidates, totals, Random(1)) for totals in _totals(len(candidates)))
        case Decider():
            alone = stage_of(request, candidates).decision
            return instance.decide(request, None), instance.decide(request, alone)
        case Handler():
            return tuple(_planned(instance, request, run) for run in _runs(instance, request, candidates))
        case Admitter():
            admit: Callable[[Request, Candidates], object] = instance.admit
            return admit(request, candidates)
        case Processor():
            process: Callable[[Request], object] = instance.process
            return process(request)
    return None


def judged(instance: Instance, answer: object, count: int) -> Iterator[Verdict]:
    """What is wrong with an answer about so many candidates."""
    match instance:
        case Scorer():
            yield from _scores(answer, count)
        case Filter() | Screener():
            if not (isinstance(answer, np.ndarray) and answer.dtype == np.bool_ and answer.shape == (count,)):
                yield _wrong(f"returned {_shown(answer)}, not a mask: booleans of shape ({count},)")
        case Producer():
            yield from _match(answer, count)
        case Picker():
            assert isinstance(answer, tuple)
            for order in answer:
                yield from _order(order, min(instance.endpoints, count), count)
        case Decider():
            assert isinstance(answer, tuple)
            yield from (_wrong(f"returned {_shown(each)}, not True or False") for each in answer if not _is_bool(each))
        case Handler():
            assert isinstance(answer, tuple)
            for plan in answer:
                if not isinstance(plan, Plan | type):
                    yield _wrong(f"returned {_shown(plan)}, not a Plan")
        case Admitter() | Processor():
            if answer is not None:
                yield Verdict("answer", "error", f"returned {_shown(answer)}", "to refuse a request, raise a Refusal")


def judged_hooks(instance: Instance, ask: Callable[[], Request], candidates: Candidates) -> Iterator[Verdict]:
    """What is wrong with what it does beside its answer. Raises what its hooks raise."""
    request, slots = ask(), candidates.slots[:1]
    if instance.pins is not None and not _is_bool(instance.pins(request)):
        yield Verdict("pins", "error", "returned something else than True or False from pins")
    if instance.chosen is not None:
        instance.chosen(request, candidates, slots)
    if isinstance(instance, Producer):
        held = instance.match(ask(), candidates)
        if held.total and not held.blocks[0]:
            yield Verdict("chosen", "warning", "finds nothing of a prompt where it has just been sent")
    if instance.answered is not None:
        endpoint = candidates.table.endpoint(int(slots[0]))
        decision = stage_of(request, candidates).decision
        for served in (endpoint.address, None):
            answer = Answer(endpoint, served, ((":status", b"200"),), decision)
            yield from _of_answer(instance.name, instance.answered, request, answer)
    if isinstance(instance, Scorer) and instance.followed is not None:
        for told in (request, ask()):  # of the second it was never asked
            instance.followed(told, False, candidates.now)
            instance.followed(told, True, candidates.now)
    if instance.forget is not None:
        instance.forget(int(slots[0]))
        instance.forget(candidates.table.width + 1000)  # of which it was never told
        if isinstance(instance, Producer) and instance.match(ask(), candidates).blocks[0]:
            yield Verdict("forget", "error", "finds a prompt in a slot that it was told to forget")


def essence(answer: object) -> object:
    """Something that is equal for equal answers."""
    match answer:
        case np.ndarray():
            return answer.dtype.kind, answer.tolist()
        case PrefixMatch():
            return answer.blocks.tolist(), answer.total, answer.block_tokens
        case Plan():
            stages = (answer.primary, answer.prefill, answer.encode)
            return [stage and stage.decision.endpoints for stage in stages], answer.set_headers, answer.name
        case tuple():
            return [essence(each) for each in answer]
    return answer


def per_candidate(answer: object) -> Floats | None:
    """What it says of each candidate, as numbers; None: it is of no such kind."""
    if isinstance(answer, PrefixMatch):
        return answer.blocks.astype(np.float64)
    return answer.astype(np.float64) if isinstance(answer, np.ndarray) else None


def stage_of(request: Request, candidates: Candidates) -> Stage:
    """What a profile comes to that prefers nobody."""
    picker = max_score.make("max-score-picker", max_score.params(), Context())
    pool = tuple(_endpoints(candidates))
    return Profile("alone", (), (), picker).decide(request, candidates, (), pool, Random(0))


# -- asking ------------------------------------------------------------------------------------------------------------


def _totals(count: int) -> Iterator[Floats]:
    for totals in (np.ones(count), np.arange(count) / count, np.zeros(count)):
        totals.flags.writeable = False
        yield totals


def _runs(handler: Handler, request: Request, candidates: Candidates) -> Iterator[RunProfile]:
    """All profiles have an endpoint; only the first has; none has."""
    first = handler.profiles[:1]

    def run(there: Sequence[str] | None) -> RunProfile:
        def stage(name: str) -> Stage:
            if there is None or name in there:
                return stage_of(request, candidates)
            raise NoEndpoint(f"no endpoint of {name}")

        return stage

    yield from (run(None), run(first), run(()))


def _planned(handler: Handler, request: Request, run: RunProfile) -> object:
    try:
        return handler.plan(request, run)
    except Refusal as refusal:
        return type(refusal)


def _endpoints(candidates: Candidates) -> Iterator[Endpoint | None]:
    table = candidates.table
    yield from (table.endpoint(slot) if table.generation(slot) else None for slot in range(table.width))


# -- judging -----------------------------------------------------------------------------------------------------------


def _of_answer(name: str, answered: Answered, request: Request, answer: Answer) -> Iterator[Verdict]:
    broken: list[Exception] = []
    headers_of_answer([(name, answered)], request, answer, lambda _, error: broken.append(error))
    yield from (Verdict("answered", "error", f"at a response: {type(each).__name__}: {each}") for each in broken)


def _scores(answer: object, count: int) -> Iterator[Verdict]:
    if not isinstance(answer, np.ndarray) or answer.shape != (count,) or answer.dtype.kind not in "fiub":
        yield _wrong(f"returned {_shown(answer)}, not scores: numbers of shape ({count},)")
    elif np.isnan(answer).any():
        yield Verdict("nan", "error", "returned NaN", NEUTRAL)
    elif answer.min() < 0 or answer.max() > 1:
        yield Verdict(
            "range", "error", f"returned scores from {answer.min():g} to {answer.max():g}, not within 0..1", CLAMPED
        )


def _match(answer: object, count: int) -> Iterator[Verdict]:
    if not isinstance(answer, PrefixMatch):
        yield _wrong(f"returned {_shown(answer)}, not a PrefixMatch")
    elif not isinstance(answer.blocks, np.ndarray) or answer.blocks.shape != (count,):
        yield _wrong(f"returned blocks that are {_shown(answer.blocks)}, not numbers of shape ({count},)")
    elif answer.blocks.min() < 0 or answer.blocks.max() > answer.total:
        yield Verdict("range", "error", f"returned more blocks than the {answer.total} of the prompt, or fewer than 0")


def _order(answer: object, wanted: int, count: int) -> Iterator[Verdict]:
    if not isinstance(answer, np.ndarray) or answer.ndim != 1 or answer.dtype.kind != "i":
        yield _wrong(f"returned {_shown(answer)}, not positions: whole numbers of shape (K,)")
        return
    best = answer[:wanted].tolist()
    if not wanted <= len(answer) <= count or len({*best}) < wanted or min(best) < 0 or max(best) >= count:
        yield _wrong(f"returned {answer.tolist()}, not the best {wanted} of positions 0..{count - 1}, none twice")


def _wrong(message: str) -> Verdict:
    return Verdict("answer", "error", message)


def _is_bool(answer: object) -> bool:
    return isinstance(answer, bool | np.bool_)


def _shown(answer: object) -> str:
    if isinstance(answer, np.ndarray):
        return f"an array of {answer.dtype} of shape {answer.shape}"
    return (
        "nothing"
        if answer is None
        else f"{'an' if type(answer).__name__[0] in 'aeiou' else 'a'} {type(answer).__name__}"
    )
