"""Who waits where: pages written by hand, and every order in which things can happen."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.dialects.request import Request
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.scheduling import lanes as lanes_module
from epp.scheduling.lanes import ANSWER, Backlog, Lanes, Prompt
from epp.scheduling.speeds import PRIOR, Speeds
from tests.scheduling.builders import ask

P = Prompt(800.0, 500_000.0, 1_000.0)
"""200 of its 1,000 tokens are cached."""


class Pool:
    """Endpoints, and their lanes."""

    def __init__(self, size: int = 2) -> None:
        self.table = EndpointTable()
        for number in range(size):
            self.put(number)
        self.speeds = Speeds()
        self.lanes = Lanes(self.speeds)
        self.lanes.read(self.table, self.table.listed)

    def put(self, number: int) -> None:
        self.table.put(Endpoint(f"default/pod-{number}", f"10.0.0.{number + 1}:8000"), 0.0)

    def send(self, slot: int, now: float, prompt: Prompt = P) -> Request:
        request = ask()
        self.lanes.send(request, slot, prompt, now)
        return request

    def page(self, slot: int, at: float, page: Page) -> None:
        """Told and read at once."""
        self.table.page_told(slot, self.table.generation(slot), page, at)
        self.lanes.read(self.table, self.table.listed)

    def before(self, slot: int) -> Backlog:
        return self.lanes.before(np.array([slot]))

    def waiting(self, slot: int) -> float:
        return self.before(slot).prompts.item()

    def context(self, slot: int) -> float:
        return self.before(slot).context.item()


def counts(
    running: float = 0.0, waiting: float = 0.0, prompts: float = 0.0, first_tokens: float = 0.0, steps: float = 0.0
) -> Page:
    """Of an engine that has answered `prompts` requests and given a first token to `first_tokens`."""
    return Page(running=running, waiting=waiting, prompts=prompts, first_tokens=first_tokens, steps=steps)


# -- what was sent from here -------------------------------------------------------------------------------------------


def test_what_was_sent_waits_until_its_first_token_and_is_context_until_it_is_over() -> None:
    pool = Pool()
    one, two = pool.send(0, 1.0), pool.send(0, 2.0, Prompt(100.0, 5_050.0, 100.0))
    before = pool.before(0)
    assert (before.prompts.item(), before.tokens.item(), before.pairs.item()) == (2.0, 900.0, 505_050.0)
    assert (before.context.item(), before.since.item()) == (0.0, 1.0)
    pool.lanes.follow(one, False, 3.0)
    before = pool.before(0)
    assert (before.prompts.item(), before.tokens.item(), before.pairs.item()) == (1.0, 100.0, 5_050.0)
    assert (before.context.item(), before.since.item()) == (1_000.0, 3.0)  # the second is begun when the first is done
    pool.lanes.follow(two, False, 3.5)
    assert pool.context(0) == 1_100.0
    pool.lanes.follow(one, True, 4.0)
    assert pool.context(0) == 100.0
    pool.lanes.follow(two, True, 5.0)
    assert (pool.waiting(0), pool.context(0)) == (0.0, 0.0)


def test_one_that_ends_without_a_first_token_waits_no_longer() -> None:
    """Refused, cut, or its answer was not seen."""
    pool = Pool()
    request = pool.send(0, 1.0)
    pool.lanes.follow(request, True, 2.0)
    assert (pool.waiting(0), pool.context(0)) == (0.0, 0.0)
    pool.lanes.follow(request, True, 3.0)  # and once more is nothing
    assert (pool.waiting(0), pool.context(0)) == (0.0, 0.0)


def test_one_behind_the_first_that_leaves_does_not_say_when_the_first_was_begun() -> None:
    pool = Pool()
    pool.send(0, 1.0)
    second = pool.send(0, 2.0)
    pool.lanes.follow(second, True, 3.0)
    assert pool.before(0).since.item() == 1.0


def test_a_request_of_two_stages_waits_at_the_first_and_is_answered_at_the_second() -> None:
    pool = Pool()
    request = ask()
    pool.lanes.send(request, 0, P, 1.0)
    pool.lanes.send(request, 1, P, 1.0)
    assert (pool.waiting(0), pool.waiting(1)) == (1.0, 0.0)
    assert pool.before(1).tokens.item() == 0.0
    pool.lanes.follow(request, False, 2.0)
    assert (pool.waiting(0), pool.context(0), pool.waiting(1), pool.context(1)) == (0.0, 0.0, 0.0, 1_000.0)
    pool.lanes.follow(request, True, 3.0)
    assert pool.context(1) == 0.0


def test_nobody_s_request_is_nothing() -> None:
    pool = Pool()
    pool.lanes.follow(ask(), False, 1.0)
    pool.lanes.follow(ask(), True, 1.0)
    assert (pool.waiting(0), pool.context(0)) == (0.0, 0.0)


# -- what pages tell ---------------------------------------------------------------------------------------------------


def test_a_page_takes_those_from_the_front_whose_first_token_has_come() -> None:
    """Three were sent and two have a first token: 0 ended + 2 running + 1 waiting - 2 first tokens."""
    pool = Pool()
    for number in range(3):
        pool.send(0, 1.0, Prompt(100.0 * (number + 1), 0.0, 100.0 * (number + 1)))
    pool.page(0, 2.0, counts(running=2, waiting=1, first_tokens=2))
    before = pool.before(0)
    assert (before.prompts.item(), before.tokens.item(), before.context.item()) == (1.0, 300.0, 300.0)


def test_what_was_sent_after_the_page_was_asked_for_is_not_on_it() -> None:
    pool = Pool()
    pool.send(0, 1.0)
    pool.send(0, 2.5)
    pool.page(0, 2.0, counts(running=1, first_tokens=1))
    assert pool.waiting(0) == 1.0
    assert pool.before(0).tokens.item() == 800.0


def test_when_the_front_left_lies_between_two_pages() -> None:
    pool = Pool()
    pool.page(0, 1.0, counts())
    pool.send(0, 1.0)
    pool.send(0, 1.2)
    pool.page(0, 2.0, counts(running=1, waiting=1, first_tokens=1))
    assert pool.before(0).since.item() == 1.5


def test_prompts_of_others_weigh_what_ours_do_on_average() -> None:
    """Ours stay near the usual one of 1,000 tokens: one in a hundred of 800 makes it 998, and 500,000 pairs."""
    pool = Pool()
    pool.send(0, 1.0)
    pool.page(0, 2.0, counts(running=2, waiting=3))
    before = pool.before(0)
    assert before.prompts.item() == 5.0
    assert before.tokens.item() == pytest.approx(800 + 4 * 998)
    assert before.pairs.item() == pytest.approx(500_000 + 4 * 500_000)
    pool.page(0, 3.0, counts(running=5, first_tokens=5))
    assert pool.waiting(0) == 0.0


def test_prompts_of_others_alone_were_not_begun_before_the_page_that_tells_of_them() -> None:
    """Else time in which nothing waited would count as work that is done."""
    pool = Pool()
    pool.lanes.follow(pool.send(0, 1.0), True, 1.5)
    pool.page(0, 60.0, counts(running=1, waiting=3))
    assert pool.before(0).since.item() == 60.0


def test_an_engine_that_counts_no_first_tokens_tells_how_many_wait() -> None:
    pool = Pool()
    for _ in range(3):
        pool.send(0, 1.0)
    pool.page(0, 2.0, Page(running=2.0, waiting=1.0))
    assert pool.waiting(0) == 1.0
    pool.page(0, 3.0, Page(running=2.0, waiting=4.0))
    assert pool.waiting(0) == 4.0


@pytest.mark.parametrize("page", [Page(), Page(kv_usage=0.5), Page(running=3.0)])
def test_a_page_that_tells_nothing_of_them_changes_nothing(page: Page) -> None:
    pool = Pool()
    pool.send(0, 1.0)
    pool.send(0, 1.0)
    pool.page(0, 2.0, page)
    assert pool.waiting(0) == 2.0


def test_requests_whose_client_left_are_off_the_count_until_the_engine_is_idle() -> None:
    """Five began and left: they are among the first tokens for ever, and among those that ended never."""
    pool = Pool()
    pool.page(0, 1.0, counts(first_tokens=5))
    for _ in range(3):
        pool.send(0, 2.0)
    pool.page(0, 3.0, counts(running=3, first_tokens=7))  # two of three have theirs
    assert pool.waiting(0) == 1.0


@given(
    st.lists(
        st.builds(
            counts,
            running=st.integers(0, 9),
            waiting=st.integers(0, 9),
            prompts=st.integers(0, 99),
            first_tokens=st.integers(0, 99),
        ),
        max_size=20,
    )
)
def test_whatever_is_counted_those_without_a_first_token_are_some_of_those_that_are_there(pages: list[Page]) -> None:
    pool = Pool()
    for number, page in enumerate(pages):
        pool.page(0, float(number), page)
        assert page.waiting is not None
        assert page.running is not None
        assert page.waiting <= pool.waiting(0) <= page.waiting + page.running
    pool.page(0, 100.0, counts(prompts=50, first_tokens=70))  # idle
    pool.page(0, 101.0, counts(running=4, waiting=1, prompts=50, first_tokens=73))
    assert pool.waiting(0) == 2.0  # five came, three began


def test_an_engine_that_begins_anew_is_believed_once_it_is_idle() -> None:
    pool = Pool()
    pool.page(0, 1.0, counts(running=3, prompts=1_000, first_tokens=1_010))
    pool.page(0, 2.0, counts())
    pool.page(0, 3.0, counts(running=2, first_tokens=1))
    assert pool.waiting(0) == 1.0


# -- what never ends ---------------------------------------------------------------------------------------------------


def test_a_slot_that_is_forgotten_is_empty_and_its_requests_are_nobody_s() -> None:
    pool = Pool()
    old = pool.send(0, 1.0)
    pool.lanes.forget(0)
    assert (pool.waiting(0), pool.context(0)) == (0.0, 0.0)
    new = pool.send(0, 2.0)
    pool.lanes.follow(old, True, 3.0)
    assert pool.waiting(0) == 1.0
    pool.lanes.follow(new, False, 4.0)
    assert pool.context(0) == 1_000.0


@pytest.mark.parametrize("gone", [0, 1])
def test_of_a_request_of_two_stages_either_slot_may_be_forgotten(gone: int) -> None:
    """The first one's work is over when the answer begins, so its slot may go while the second answers."""
    pool = Pool()
    request = ask()
    pool.lanes.send(request, 0, P, 1.0)
    pool.lanes.send(request, 1, P, 1.0)
    pool.lanes.forget(gone)
    pool.lanes.follow(request, False, 2.0)
    pool.lanes.follow(request, True, 3.0)
    for slot in (0, 1):
        assert pool.waiting(slot) == 0.0
        pool.lanes.follow(pool.send(slot, 4.0), False, 5.0)
        assert pool.context(slot) == 1_000.0  # its own alone, and nothing less


def test_requests_that_nobody_says_are_over_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "MOST", 10)
    pool = Pool()
    for number in range(50):
        pool.send(0, float(number))
    assert pool.waiting(0) == 10.0
    pool.page(0, 60.0, counts(running=10, first_tokens=10))
    assert pool.context(0) == 10_000.0


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 2), st.integers(0, 9_000)),
        st.tuples(st.just("second"), st.integers(0, 2), st.integers(0, 50)),
        st.tuples(st.sampled_from(["first", "over", "again"]), st.integers(0, 50), st.integers(0, 1)),
        st.tuples(st.just("forget"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("page"), st.integers(0, 2), st.integers(0, 6 * 6 * 9 * 9 * 9 - 1)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_whatever_happens_nothing_is_below_zero_and_at_the_end_all_of_it_is_zero(
    steps: list[tuple[str, int, int]],
) -> None:
    pool, sent, now = Pool(3), list[Request](), 0.0
    for what, a, b in steps:
        now += 0.25
        if what == "send":
            sent.append(pool.send(a, now, Prompt(float(b // 2), float(b * b), float(b))))
        elif what == "second" and sent:
            pool.lanes.send(sent[b % len(sent)], a, P, now)
        elif what in ("first", "over", "again") and sent:
            pool.lanes.follow(sent[a % len(sent)] if what != "again" else ask(), what == "over" or bool(b), now)
        elif what == "forget":
            pool.table.drop(f"default/pod-{a}")
            pool.lanes.forget(a)
            pool.put(a)
        elif what == "page":
            pool.page(a, now - 0.1, page_of(b))
        backlog = pool.lanes.before(pool.table.listed)
        for column in (backlog.prompts, backlog.tokens, backlog.pairs, backlog.context):
            assert (column >= 0).all()
        assert (backlog.since <= now).all()
    for request in sent:
        pool.lanes.follow(request, True, now + 1)
    for slot in range(3):
        pool.page(slot, now + 2, counts())
        backlog = pool.before(slot)
        assert [backlog.prompts, backlog.tokens, backlog.pairs, backlog.context] == [0.0] * 4
        pool.lanes.follow(pool.send(slot, now + 3), False, now + 4)
        assert pool.context(slot) == 1_000.0  # and what is in flight was neither below zero nor above


def page_of(number: int) -> Page:
    """Every number below 26,244 is another page; 5 of a gauge, and 8 of a counter, is one that does not tell."""
    values: list[float | None] = []
    for base in (6, 6, 9, 9, 9):
        number, value = divmod(number, base)
        values.append(None if value == base - 1 else float(value))
    running, waiting, prompts, first_tokens, steps = values
    return Page(running=running, waiting=waiting, prompts=prompts, first_tokens=first_tokens, steps=steps)


# -- what it teaches ---------------------------------------------------------------------------------------------------


def constants(pool: Pool, slot: int = 0) -> list[float]:
    return [*map(float, pool.speeds.of(np.array([slot]), 4)[:, 0])]


def working(second: int, **other: float | None) -> Page:
    """Of an engine that answers four in steps of 20 ms, twice what is thought at first."""
    tokens = 200.0 * second
    page = Page(running=4.0, waiting=0.0, prompts=0.0, first_tokens=4.0, processed=tokens, generated=tokens)
    return msgspec.structs.replace(page, **{"steps": 50.0 * second, **other})


def work(pool: Pool, at: float, second: int, **other: float | None) -> None:
    pool.page(0, at, working(second, **other))


def test_pages_of_a_busy_engine_teach_how_fast_it_is() -> None:
    pool = Pool()
    for second in range(60):
        work(pool, float(second), second)
    assert constants(pool)[0] == pytest.approx(20e-3, rel=0.05)


@pytest.mark.parametrize("unknown", ["steps", "processed", "generated", "prompts"])
def test_what_an_engine_does_not_tell_teaches_nothing_and_breaks_nothing(unknown: str) -> None:
    pool = Pool()
    for second in range(20):
        work(pool, float(second), second, **{unknown: None})
    assert constants(pool) == PRIOR.tolist()
    assert pool.lanes.answer == ANSWER


def test_an_engine_that_begins_anew_is_learned_from_its_new_counts_alone() -> None:
    pool = Pool()
    for second in range(1, 31):
        work(pool, float(second), second)
    before = constants(pool)
    work(pool, 31.0, 0)  # all its counters are at the beginning
    assert constants(pool) == before
    for second in range(1, 30):
        work(pool, 31.0 + second, second)
    assert constants(pool)[0] == pytest.approx(20e-3, rel=0.05)


def test_a_piece_of_time_that_ends_idle_teaches_nothing() -> None:
    """Nobody knows for how long it stood still."""
    pool = Pool()
    for second in range(0, 60, 2):
        work(pool, float(second), second)
        work(pool, float(second) + 1, second, running=0.0)
    assert constants(pool) == PRIOR.tolist()


def test_pieces_in_which_most_prompts_were_those_of_others_teach_nothing() -> None:
    """Nobody knows how long each of them was, so nobody knows their pairs."""
    pool = Pool()
    for second in range(60):
        work(pool, float(second), second, processed=10_200.0 * second)
    assert constants(pool) == PRIOR.tolist()


def test_while_prompts_wait_all_the_time_only_long_pieces_teach() -> None:
    pool = Pool()
    for second in range(5):
        work(pool, float(second), second, waiting=2.0, first_tokens=4.0 + second, prompts=float(second))
        assert constants(pool) == PRIOR.tolist()
    work(pool, 5.0, 5, waiting=2.0, first_tokens=9.0, prompts=5.0)
    assert constants(pool)[0] > 1.2 * PRIOR.item(0)


def test_answers_are_as_long_as_pages_say() -> None:
    """Twenty tokens each: 600 ended in a minute."""
    pool = Pool()
    for second in range(61):
        work(pool, float(second), second, prompts=10.0 * second, first_tokens=4.0 + 10.0 * second)
    assert pool.lanes.answer == pytest.approx((ANSWER + 60 * 200) / (1 + 600))


@pytest.mark.parametrize("page", [None, Page(running=1.0, waiting=0.0)])
def test_where_no_steps_are_counted_first_tokens_that_are_seen_teach(page: Page | None) -> None:
    """Prompts of 8,000 tokens in 1.2 s: three times what is thought at first, 2 steps + 8,000 * 50 us."""
    pool, prompt = Pool(), Prompt(8_000.0, 0.0, 8_000.0)
    foreseen = PRIOR.item(0) * (1 + 8_000 / 8_192) + PRIOR.item(1) * 8_000
    for number in range(100):
        request = pool.send(0, 10.0 * number, prompt)
        if page is not None:
            pool.page(0, 10.0 * number - 1, page)
        pool.lanes.follow(request, False, 10.0 * number + 3 * foreseen)
        pool.lanes.follow(request, True, 10.0 * number + 5)
    found = constants(pool)
    assert found[0] * (1 + 8_000 / 8_192) + found[1] * 8_000 == pytest.approx(3 * foreseen, rel=0.1)


def test_where_steps_are_counted_first_tokens_teach_nothing() -> None:
    pool = Pool()
    pool.page(0, 1.0, counts())
    request = pool.send(0, 1.0)
    pool.lanes.follow(request, False, 3.0)
    assert constants(pool) == PRIOR.tolist()


def test_a_first_token_of_one_that_was_not_the_first_teaches_nothing() -> None:
    pool = Pool()
    pool.send(0, 1.0)
    pool.lanes.follow(pool.send(0, 1.0), False, 3.0)
    assert constants(pool) == PRIOR.tolist()
    assert not math.isnan(sum(constants(pool)))
