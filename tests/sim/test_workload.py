"""Workloads: lengths, sharing, rates, and that a seed decides everything."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice, pairwise

import pytest

from epp.sim import text
from epp.sim.profile import load_profile
from epp.sim.workload import BUILT_IN, DEMO, NO_SHARING, Arrival, Chats, Prompts, Workload


def one(tenant: Prompts | Chats, rate: float = 10.0) -> Workload:
    return Workload("test", "base", rate, (tenant,))


def prompts(*, groups: int = 3, questions: int = 2, shared_tokens: int = 40, models: tuple[str, ...] = ()) -> Prompts:
    return Prompts("p", 1.0, groups, questions, shared_tokens, question_tokens=20, output_tokens=5, models=models)


def chats(*, turns: int = 3, think_time: float = 2.0) -> Chats:
    return Chats("c", 1.0, turns, think_time, system_tokens=30, user_tokens=20, output_tokens=5)


def tokens(arrival: Arrival) -> int:
    return text.count_tokens(text.chat_prompt(arrival.messages))


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_same_seed_same_arrivals_and_another_seed_others(name: str) -> None:
    workload = BUILT_IN[name]
    assert list(workload.arrivals(1, 5.0)) == list(workload.arrivals(1, 5.0))
    assert list(workload.arrivals(1, 5.0)) != list(workload.arrivals(2, 5.0))


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_arrivals_come_in_order_within_the_duration_and_at_the_rate(name: str) -> None:
    workload = BUILT_IN[name]
    arrivals = list(workload.arrivals(3, 200.0))
    assert all(earlier.at <= later.at for earlier, later in pairwise(arrivals))
    assert all(0 <= arrival.at < 200 for arrival in arrivals)
    expected = 200 * workload.rate
    assert abs(len(arrivals) - expected) < 5 * math.sqrt(expected)  # five standard deviations of a Poisson process
    for tenant in workload.tenants:
        share = sum(arrival.tenant == tenant.tenant for arrival in arrivals)
        assert abs(share - expected * tenant.share) < 6 * math.sqrt(expected * tenant.share)


def test_an_endless_workload_is_made_as_it_is_asked_for() -> None:
    assert len(list(islice(DEMO.arrivals(1), 500))) == 500


def test_prompts_of_a_group_share_their_first_tokens_and_no_more() -> None:
    groups: dict[str, set[bytes]] = {}
    for arrival in one(prompts()).arrivals(1, 60.0):
        assert tokens(arrival) == 60
        groups.setdefault(arrival.session, set()).add(text.chat_prompt(arrival.messages))
    assert len(groups) == 3
    for asked in groups.values():
        first, second = asked
        assert first[: 40 * 4] == second[: 40 * 4]
    assert len({prompt[: 16 * 4] for asked in groups.values() for prompt in asked}) == 3


def test_prompts_without_sharing_are_all_different_from_the_first_block_on() -> None:
    unshared = one(Prompts("p", 1.0, 1, 0, shared_tokens=0, question_tokens=50, output_tokens=5))
    arrivals = list(unshared.arrivals(1, 30.0))
    assert len({text.block_keys(text.chat_prompt(arrival.messages), 16)[0] for arrival in arrivals}) == len(arrivals)
    assert {tokens(arrival) for arrival in arrivals} == {50}


def test_models_are_dealt_to_groups_in_turn() -> None:
    arrivals = one(prompts(groups=4, models=("x", "y"))).arrivals(1, 60.0)
    assert {(arrival.session[-1], arrival.model) for arrival in arrivals} == {
        ("0", "x"),
        ("1", "y"),
        ("2", "x"),
        ("3", "y"),
    }


def test_a_turn_of_a_chat_begins_with_the_turn_before_and_its_answer() -> None:
    last: dict[str, Arrival] = {}
    followed = 0
    for arrival in one(chats()).arrivals(1, 60.0):
        assert tokens(arrival) == 30 + 20 + arrival.turn * (20 + 5)
        if (before := last.get(arrival.session)) is not None:
            assert arrival.turn == before.turn + 1
            said = text.with_answer(text.chat_prompt(before.messages), before.max_tokens)
            assert text.chat_prompt(arrival.messages).startswith(said)
            followed += 1
        last[arrival.session] = arrival
    assert followed > 100


def test_all_turns_of_chats_are_as_frequent_from_the_first_second_on() -> None:
    turns = Counter(arrival.turn for arrival in one(chats(), rate=300.0).arrivals(1, 10.0) if arrival.at < 5)
    assert set(turns) == {0, 1, 2}
    assert all(abs(count - 500) < 5 * math.sqrt(500) for count in turns.values())


def test_chats_pause_as_long_as_they_think() -> None:
    last: dict[str, float] = {}
    pauses = []
    for arrival in one(chats(think_time=2.0)).arrivals(1, 300.0):
        if arrival.session in last:
            pauses.append(arrival.at - last[arrival.session])
        last[arrival.session] = arrival.at
    assert sum(pauses) / len(pauses) == pytest.approx(2.0, rel=0.1)


def test_demo_has_the_proportions_of_the_published_workload() -> None:
    """llm-d 73-capacity: 1,200 of 7,200 prompt tokens are the question's, all prompts are 73 % of the fleet's cache."""
    search = DEMO.tenants[0]
    assert isinstance(search, Prompts)
    assert search.shared_tokens / search.question_tokens == 6000 / 1200
    assert search.output_tokens / search.question_tokens == 500 / 1200
    distinct = search.groups * (search.shared_tokens + search.questions * search.question_tokens)
    published = 150 * (6000 + 5 * 1200) / (8 * 307_328)
    assert distinct / (4 * load_profile("demo").kv_tokens) == pytest.approx(published, rel=0.001)


def test_adapters_are_all_models_but_the_base() -> None:
    assert DEMO.adapters == ("legal", "medical", "sql", "support")
    assert NO_SHARING.adapters == ()
