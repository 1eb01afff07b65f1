"""Workloads: lengths, sharing, rates, and that a seed decides everything."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice, pairwise
from random import Random
from statistics import fmean, median, pstdev, quantiles

import pytest

from epp.sim import text
from epp.sim.profile import load_profile
from epp.sim.workload import BUILT_IN, DEMO, NO_SHARING, Agents, Arrival, Chats, Prompts, Spread, Workload


def one(tenant: Prompts | Chats | Agents, rate: float = 10.0) -> Workload:
    return Workload("test", "base", rate, (tenant,))


def prompts(*, groups: int = 3, questions: int = 2, shared_tokens: int = 40, models: tuple[str, ...] = ()) -> Prompts:
    return Prompts("p", 1.0, groups, questions, shared_tokens, question_tokens=20, output_tokens=5, models=models)


def chats(*, turns: int = 3, think_time: float = 2.0) -> Chats:
    return Chats("c", 1.0, turns, think_time, system_tokens=30, user_tokens=20, output_tokens=5)


def agents(*, turns: int = 10, limit_tokens: int = 400, gap_p50: float = 2.0, variation: float = 1.0) -> Agents:
    return Agents(
        "a",
        1.0,
        turns=turns,
        gap_p50=gap_p50,
        gap_p99=20.0,
        answer_time=1.0,
        system_tokens=40,
        task_tokens=60,
        limit_tokens=limit_tokens,
        result_p50=30,
        result_p99=90,
        output_tokens=20,
        models=("x", "y"),
        variation=variation,
    )


def sessions(arrivals: list[Arrival]) -> list[list[Arrival]]:
    """The turns of each session, of those that begin and end in these arrivals or not."""
    found: dict[str, list[Arrival]] = {}
    for arrival in arrivals:
        found.setdefault(arrival.session, []).append(arrival)
    return list(found.values())


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


def test_a_turn_of_an_agent_is_the_one_before_its_answer_and_a_result_or_begins_anew() -> None:
    followed = compacted = 0
    for turns in sessions(list(one(agents()).arrivals(1, 600.0))):
        for before, arrival in pairwise(turns):
            assert arrival.turn == before.turn + 1
            said = text.with_answer(text.chat_prompt(before.messages), before.max_tokens)
            if text.chat_prompt(arrival.messages).startswith(said):
                assert tokens(before) + 20 < tokens(arrival) <= 400
                followed += 1
            else:
                assert tokens(arrival) == 40 + 60
                assert arrival.messages[0] == before.messages[0]
                compacted += 1
    # From 100 tokens to 400 by 20 of answer and 30 exp(0.472^2 / 2) = 33.5 of result: the sixth of nine turns more.
    assert compacted / (followed + compacted) == pytest.approx(1 / 9, rel=0.1)


def test_a_session_of_an_agent_has_its_turns_its_model_and_no_text_of_another() -> None:
    whole = [turns for turns in sessions(list(one(agents()).arrivals(1, 600.0))) if turns[0].turn == 0]
    complete = [turns for turns in whole if turns[-1].turn == 9]
    assert len(complete) > 100
    assert all([arrival.turn for arrival in turns] == list(range(10)) for turns in complete)
    assert all(len({arrival.model for arrival in turns}) == 1 for turns in whole)
    assert {turns[0].model for turns in whole} == {"x", "y"}
    tasks = {turns[0].messages[1] for turns in whole}
    assert len(tasks) == len(whole)


def test_agents_pause_as_their_percentiles_say() -> None:
    """A pause is the second that an answer is thought to take, and a log-normal time of its own."""
    pauses = [
        later.at - earlier.at - 1.0
        for turns in sessions(list(one(agents()).arrivals(1, 2000.0)))
        for earlier, later in pairwise(turns)
    ]
    assert min(pauses) >= 0
    assert median(pauses) == pytest.approx(2.0, rel=0.05)
    assert quantiles(pauses, n=100)[98] == pytest.approx(20.0, rel=0.15)


def test_agents_live_as_long_as_is_said_and_all_their_turns_are_as_frequent_from_the_first_second_on() -> None:
    """Mean of the log-normal: 2 exp(0.99^2 / 2) = 3.26 s; ten turns of that and a second are 42.6 s."""
    assert agents().life == pytest.approx(42.6, abs=0.1)
    turns = Counter(arrival.turn for arrival in one(agents(), rate=400.0).arrivals(1, 10.0) if arrival.at < 5)
    assert set(turns) == set(range(10))
    assert all(abs(count - 200) < 5 * math.sqrt(200) for count in turns.values())


def test_an_agent_s_workload_is_made_as_it_is_asked_for() -> None:
    assert len(list(islice(one(agents(), rate=1.0).arrivals(1), 300))) == 300


@pytest.mark.parametrize("tenant", [Chats("c", 1.0, 1, 1.0, 30, 20, 5, variation=0.0), agents(turns=1, variation=0.0)])
def test_sessions_begin_as_evenly_as_they_are_asked_to(tenant: Chats | Agents) -> None:
    gaps = [later.at - earlier.at for earlier, later in pairwise(one(tenant).arrivals(1, 20.0))]
    assert gaps == [pytest.approx(0.1)] * len(gaps)


def test_first_groups_are_asked_more_often_where_that_is_said() -> None:
    """Zipf: groups 0, 1 and 2 by 1, 1/2 and 1/3, which are 6, 3 and 2 of 11."""
    tenant = Prompts("p", 1.0, 3, 0, 40, 20, 5, models=("x", "y", "z"), skew=1.0)
    models = Counter(arrival.model for arrival in one(tenant).arrivals(1, 600.0))
    share = {model: count / models.total() for model, count in models.items()}
    assert share == {name: pytest.approx(part / 11, abs=0.03) for name, part in (("x", 6), ("y", 3), ("z", 2))}


@pytest.mark.parametrize(
    ("spread", "deviation"),
    [
        (Spread("normal", 0.2, 0.0, 2.0), 0.2),
        (Spread("lognormal", 0.5, 0.0, 100.0), 0.5),
        (Spread("uniform", 0.0, 0.5, 1.5), 1 / math.sqrt(12)),
    ],
)
def test_spreads_have_a_mean_of_one_and_the_deviation_that_is_asked_for(spread: Spread, deviation: float) -> None:
    rng = Random(1)
    drawn = [spread.draw(rng) for _ in range(20_000)]
    assert fmean(drawn) == pytest.approx(1.0, abs=0.02)
    assert pstdev(drawn) == pytest.approx(deviation, rel=0.05)


def test_what_is_drawn_beyond_the_ends_is_the_ends() -> None:
    rng = Random(1)
    drawn = [Spread("normal", 1.0, 0.9, 1.1).draw(rng) for _ in range(200)]
    assert {min(drawn), max(drawn)} == {0.9, 1.1}
