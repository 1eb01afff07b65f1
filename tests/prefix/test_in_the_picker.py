"""What answers say of their tokens, and what the next decisions make of it."""

from __future__ import annotations

import json

import pytest

from epp import dialects
from epp.endpoints.table import Page
from epp.headers import Headers
from epp.picker import Picker
from epp.prefix.ratio import ENOUGH, PRIOR
from epp.ticket import Outcome, Ticket
from tests.contract.transport import picker_for
from tests.watching import Watch

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
POST: Headers = ((":method", b"POST"), (":path", b"/v1/completions"))
OK: Headers = ((":status", b"200"), ("content-type", b"application/json"))


def pool_of(*endpoints: str, blocks: int = 10) -> Picker:
    """The default profile; each endpoint has room for so many blocks of 64 tokens."""
    picker = picker_for(endpoints, Watch(), "")
    for slot in range(len(endpoints)):
        page = Page(waiting=0, kv_usage=0, kv_blocks=4 * blocks, block_size=16)
        picker.table.page_told(slot, picker.table.generation(slot), page, 0.0)
    return picker


def prompt(name: str, blocks: int) -> str:
    return "".join(f"{name} {i}".ljust(256) for i in range(blocks))


def decide(picker: Picker, text: object, model: str = "m") -> Ticket:
    body = json.dumps({"model": model, "prompt": text}).encode()
    return picker.decide(dialects.read(POST, body), None, started_at=0.0, now=0.0)[0]


def run(picker: Picker, text: object, usage: dict[str, object], model: str = "m", served: str | None = None) -> Ticket:
    """One request, and an answer with this usage, by the endpoint that was chosen or another one."""
    ticket = decide(picker, text, model)
    picker.response_started(ticket, OK, served, now=0.5, bodies_seen=True)
    picker.response_data(ticket, json.dumps({"usage": usage}).encode(), now=0.5)
    picker.response_ended(ticket)
    picker.finish(ticket, Outcome.COMPLETE, now=1.0)
    return ticket


def test_the_next_prompts_of_the_model_weigh_what_they_really_do() -> None:
    picker = pool_of(A, blocks=1000)
    estimated = run(picker, prompt("a", 100), {"prompt_tokens": 12_802}).decision.prompt_tokens
    assert estimated == (25_600 + 2) // 4 + 1 == 6_401
    ratio = (PRIOR + 12_802) / (PRIOR + 6_401)
    again, adapter = decide(picker, prompt("b", 100)), decide(picker, prompt("b", 100), "adapter")
    assert again.decision.prompt_tokens == round(6_401 * ratio) == 11_278
    assert adapter.decision.prompt_tokens == 6_401
    inflight, _ = picker.table.column("inflight_tokens", picker.table.listed, 0.0)
    assert inflight.tolist() == [11_278 + 6_401]


def test_what_was_held_before_is_found_after_something_was_learned_and_counted_in_the_same_tokens() -> None:
    picker = pool_of(A, blocks=1000)
    run(picker, prompt("a", 100), {"prompt_tokens": 12_802})
    decision = decide(picker, prompt("a", 100)).decision
    assert decision.prompt_tokens == 11_278
    assert decision.matched_tokens == 11_278  # 100 * round(64 * 1.762), but never more than there are


@pytest.mark.parametrize("text", [[1, 2, 3] * 100, [[1, 2], [3] * 500]])
def test_prompts_of_token_ids_are_exact_and_teach_nothing(text: object) -> None:
    picker = pool_of(A)
    run(picker, text, {"prompt_tokens": 900})
    assert picker.ratios.of("m") == 1.0
    run(picker, prompt("a", 40), {"prompt_tokens": 5_000})
    assert picker.ratios.of("m") > 1.0
    exact = 300 if text == [1, 2, 3] * 100 else 502
    assert decide(picker, text).decision.prompt_tokens == exact


@pytest.mark.parametrize("usage", [{}, {"completion_tokens": 5}, {"prompt_tokens": 0}, {"prompt_tokens": "many"}])
def test_an_answer_that_does_not_say_teaches_nothing(usage: dict[str, object]) -> None:
    picker = pool_of(A)
    run(picker, prompt("a", 4), usage)
    assert picker.ratios.of("m") == 1.0


def test_a_rewritten_model_is_learned_under_the_name_that_computes() -> None:
    picker = pool_of(A, blocks=1000)
    body = json.dumps({"model": "alias", "prompt": prompt("a", 100)}).encode()
    request = dialects.read((*POST, ("x-llm-d-model-name-rewrite", b"m")), body)
    ticket, _ = picker.decide(request, None, 0.0, 0.0)
    picker.response_started(ticket, OK, None, 0.5, bodies_seen=True)
    picker.response_data(ticket, b'{"usage":{"prompt_tokens":12802}}', 0.5)
    picker.response_ended(ticket)
    picker.finish(ticket, Outcome.COMPLETE, now=1.0)
    assert (picker.ratios.of("m"), picker.ratios.of("alias")) == ((PRIOR + 12_802) / (PRIOR + 6_401), 1.0)


def matched(picker: Picker, text: str) -> float:
    """Believed of the first endpoint, by a request that is given up at once."""
    ticket = decide(picker, text)
    picker.finish(ticket, Outcome.UNANSWERED, now=1.0)
    return ticket.decision.matched_tokens


def test_a_long_answer_pushes_out_what_is_old() -> None:
    picker = pool_of(A)
    run(picker, prompt("old", 2), {})
    run(picker, prompt("new", 2), {"completion_tokens": 7 * 64})  # with the new prompt nine blocks, of ten
    assert matched(picker, prompt("old", 2)) == 128  # and used again
    run(picker, prompt("new", 2), {"completion_tokens": 11 * 64})
    assert matched(picker, prompt("old", 2)) == 0


def test_what_came_from_the_engines_cache_was_not_computed() -> None:
    """The prompt was believed new, and the engine found all of it: those blocks pushed out nothing."""
    picker = pool_of(A)
    run(picker, prompt("old", 2), {})
    usage = {"prompt_tokens": 4 * 64 + 1, "prompt_tokens_details": {"cached_tokens": 4 * 64}, "completion_tokens": 64}
    run(picker, prompt("new", 4), usage)  # four blocks believed, and one of the answer that is held against them
    run(picker, prompt("third", 5), {})
    assert matched(picker, prompt("old", 2)) == 64  # by room alone: 5 + 4 of the ten blocks leave one


def test_the_endpoint_that_served_in_the_place_of_another_computed_it() -> None:
    picker = pool_of(A, B)
    first = run(picker, prompt("old", 2), {}).endpoint.address
    other = B if first == A else A
    run(picker, prompt("old", 2), {"completion_tokens": 20 * 64}, served=other)  # nothing was ever sent there
    assert matched(picker, prompt("old", 2)) == 128


def told(picker: Picker, tokens: float, prompts: float) -> None:
    page = Page(waiting=0, kv_usage=0, prompt_tokens=tokens, prompts=prompts)
    picker.table.page_told(0, picker.table.generation(0), page, 0.0)


def run_unseen(picker: Picker, text: object) -> None:
    """One request whose answer is not shown to the picker."""
    ticket = decide(picker, text)
    picker.response_started(ticket, OK, None, now=0.5, bodies_seen=False)
    picker.finish(ticket, Outcome.COMPLETE, now=1.0)


def test_where_answers_are_not_seen_the_engines_counters_teach() -> None:
    """64 prompts of 6,401 estimated tokens had 12,802 each, says the engine."""
    picker = pool_of(A, blocks=1000)
    told(picker, 1_000, 10)
    run_unseen(picker, prompt("a", 100))  # the first one only reads where the counters are
    for _ in range(ENOUGH):
        run_unseen(picker, prompt("a", 100))
    told(picker, 1_000 + 65 * 12_802, 10 + 65)
    run_unseen(picker, prompt("a", 100))
    estimated = ENOUGH * 6_401.0 + 6_401  # of all that were sent since
    assert picker.ratios.of("m") == pytest.approx((PRIOR + 2 * estimated) / (PRIOR + estimated))


def test_an_engine_that_does_not_count_prompts_teaches_nothing() -> None:
    picker = pool_of(A, blocks=1000)
    for _ in range(2 * ENOUGH):
        run_unseen(picker, prompt("a", 100))
    assert picker.ratios.of("m") == 1.0


def test_an_endpoint_that_takes_the_slot_of_another_does_not_inherit_its_counters() -> None:
    picker = pool_of(A, blocks=1000)
    told(picker, 1_000, 10)
    for _ in range(ENOUGH + 1):
        run_unseen(picker, prompt("a", 100))
    picker.forget(0)
    told(picker, 1_000_000_000, 1_000_000)
    run_unseen(picker, prompt("a", 100))
    assert picker.ratios.of("m") == 1.0
