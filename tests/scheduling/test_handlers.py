"""Which profiles run for a request, and what they come to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from google.protobuf.json_format import ParseDict

from epp.dialects import read
from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates, Endpoint, EndpointTable, Page
from epp.errors import BadRequest, ConfigError, NoEndpoint, Saturated
from epp.headers import Headers
from epp.pb import decision_pb2
from epp.scheduling import handlers
from epp.scheduling.deciders import PrefixBasedParams, always, multimodal, prefix_based
from epp.scheduling.decision import Decision
from epp.scheduling.labels import decode_role, encode_role, prefill_role
from epp.scheduling.lineup import Lineup
from epp.scheduling.pickers import max_score
from epp.scheduling.plugin import (
    Context,
    Decider,
    Filter,
    Handler,
    NoParams,
    Params,
    PickerParams,
    Plugin,
    Producer,
    decider,
    filter_,
)
from epp.scheduling.profile import Profile
from epp.scheduling.scheduler import Scheduler
from epp.scheduling.scorers import queue
from tests.scheduling.builders import NOW, ask, made, pool, with_prefix

IMAGE = read(
    ((":path", b"/v1/chat/completions"),),
    b'{"model":"base","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"u"}}]}]}',
)


def profile(name: str, *filters: Filter, endpoints: int = 1) -> Profile:
    picker = made(max_score, PickerParams(max_num_of_endpoints=endpoints))
    return Profile(name, filters, [(made(queue), 1.0)], picker)


def stages(*names: str, endpoints: int = 1) -> list[Profile]:
    roles = {"decode": decode_role, "prefill": prefill_role, "encode": encode_role}
    return [profile(name, made(roles[name]), endpoints=endpoints) for name in names]


@decider("fails", params=NoParams)
def fails(request: Request, decode: Decision | None, params: NoParams) -> bool:
    """Fail."""
    raise RuntimeError("no")


@decider("never", params=NoParams)
def never(request: Request, decode: Decision | None, params: NoParams) -> bool:
    """Never."""
    return False


DECIDERS: Mapping[str, Decider] = {
    "always": made(always),
    "media": made(multimodal),
    "fails": made(fails),
    "never": made(never),
    "prefix": made(prefix_based, PrefixBasedParams(non_cached_tokens=64)),
}


def handled(
    plugin: Plugin[Handler],
    parameters: dict[str, Any],
    profiles: Sequence[Profile],
    producers: Sequence[Producer] = (),
) -> Scheduler:
    params: Params = msgspec.convert(parameters, plugin.params)
    context = Context(deciders=DECIDERS, profiles=tuple(profile.name for profile in profiles))
    chosen = made(plugin, params, context)
    return Scheduler(Lineup(profiles, producers, handler=chosen, others=list(DECIDERS.values())), Random(0))


def disagg(runnable: Sequence[Profile], **parameters: Any) -> Scheduler:
    return handled(handlers.disaggregated, parameters, runnable)


def roles(*names: str, waiting: Sequence[float] = ()) -> Candidates:
    """Endpoint i has the i-th role."""
    pages = [Page(waiting=value) for value in (waiting or [0.0] * len(names))]
    return pool(*pages, labels=[{"llm-d.ai/role": name} for name in names])


def address(slot: int) -> str:
    return f"192.168.1.{slot + 1}:8000"


PD = {"deciders": {"prefill": "always"}}
EPD = {"deciders": {"prefill": "always", "encode": "media"}}

# -- disagg-profile-handler --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "request_", "plan", "headers"),
    [
        ({}, IMAGE, "decode-only", ()),
        (PD, ask(), "prefill-decode", (("x-prefiller-host-port", b"192.168.1.2:8000"),)),
        (EPD, ask(), "prefill-decode", (("x-prefiller-host-port", b"192.168.1.2:8000"),)),
        (
            {"deciders": {"encode": "media"}},
            IMAGE,
            "encode-decode",
            (("x-encoder-hosts-ports", b"192.168.1.3:8000"),),
        ),
        (
            EPD,
            IMAGE,
            "encode-prefill-decode",
            (("x-prefiller-host-port", b"192.168.1.2:8000"), ("x-encoder-hosts-ports", b"192.168.1.3:8000")),
        ),
        ({"deciders": {"prefill": "never"}}, ask(), "decode-only", ()),
    ],
)
def test_stages_run_as_their_deciders_say_and_the_side_car_is_told(
    parameters: dict[str, Any], request_: Request, plan: str, headers: Headers
) -> None:
    choosing = disagg(stages("prefill", "decode", "encode"), **parameters)
    decision = choosing.schedule(request_, roles("decode", "prefill", "encode"))
    assert decision.endpoints == (address(0),)
    assert decision.profile == "decode"
    assert (decision.plan, decision.set_headers) == (plan, headers)
    assert (decision.prefill is not None) == ("prefill" in plan)
    assert (decision.encode is not None) == ("encode" in plan)
    assert decision.failures == ()


def test_every_encoder_is_named_and_only_the_first_prefiller() -> None:
    choosing = disagg(stages("decode", "prefill", "encode", endpoints=2), **EPD)
    names = ("decode", "decode", "prefill", "prefill", "encode", "encode")
    decision = choosing.schedule(IMAGE, roles(*names, waiting=[0, 1, 0, 1, 0, 1]))
    assert decision.endpoints == (address(0), address(1))
    assert decision.set_headers == (
        ("x-prefiller-host-port", address(2).encode()),
        ("x-encoder-hosts-ports", f"{address(4)},{address(5)}".encode()),
    )


def test_a_stage_without_an_endpoint_is_named_and_the_destination_does_its_work() -> None:
    decision = disagg(stages("decode", "prefill", "encode"), **EPD).schedule(IMAGE, roles("decode", "decode"))
    assert (decision.plan, decision.set_headers) == ("decode-only", ())
    assert decision.prefill is decision.encode is None
    assert [(each.plugin, each.reason) for each in decision.failures] == [
        ("encode", "no endpoint may serve this request: of 2 endpoints, encode-filter left out 2"),
        ("prefill", "no endpoint may serve this request: of 2 endpoints, prefill-filter left out 2"),
    ]


def test_a_stage_whose_endpoints_are_full_is_named_too() -> None:
    @filter_("full", params=NoParams)
    def full(request: Request, candidates: Candidates, params: NoParams) -> Bools:
        """Say that everybody is full."""
        raise Saturated("all full")

    profiles = [*stages("decode"), profile("prefill", made(full))]
    decision = disagg(profiles, **PD).schedule(ask(), roles("decode", "prefill"))
    assert decision.plan == "decode-only"
    assert [(each.plugin, each.reason) for each in decision.failures] == [("prefill", "all full")]


@pytest.mark.parametrize("order", ["decode-first", "prefill-first"])
def test_without_a_decode_endpoint_it_is_a_503(order: str) -> None:
    choosing = disagg(stages("decode", "prefill"), stageOrder=order)
    with pytest.raises(NoEndpoint, match="decode-filter left out 1") as caught:
        choosing.schedule(ask(), roles("prefill"))
    assert (caught.value.status, caught.value.reason) == (503, "rejected-no-endpoints")


def test_a_decider_that_fails_wants_nothing_and_is_named() -> None:
    deciders = {"prefill": "fails", "encode": "media"}
    decision = disagg(stages("decode", "prefill", "encode"), deciders=deciders).schedule(
        IMAGE, roles("decode", "prefill", "encode")
    )
    assert decision.plan == "encode-decode"
    assert [(each.plugin, each.reason) for each in decision.failures] == [("fails", "RuntimeError: no")]


def test_a_stage_that_is_wanted_and_has_no_profile_is_named() -> None:
    decision = disagg(stages("decode"), **PD).schedule(ask(), roles("decode", "prefill"))
    assert decision.plan == "decode-only"
    assert [(each.plugin, each.reason) for each in decision.failures] == [("prefill", "no profile has this name")]


def test_an_endpoint_of_both_roles_that_is_chosen_twice_does_it_alone() -> None:
    """One candidate. Else it would be told to fetch from itself."""
    decision = disagg(stages("decode", "prefill", "encode"), **EPD).schedule(IMAGE, roles("encode-prefill-decode"))
    assert (decision.plan, decision.set_headers, decision.failures) == ("decode-only", (), ())
    assert decision.prefill is decision.encode is None


def test_prefill_first_always_prefills_where_there_is_a_profile_for_it() -> None:
    choosing = disagg(stages("decode", "prefill", "encode"), stageOrder="prefill-first", deciders={"encode": "media"})
    candidates = roles("decode", "prefill", "encode")
    assert choosing.schedule(ask(), candidates).plan == "prefill-decode"
    assert choosing.schedule(IMAGE, candidates).plan == "encode-prefill-decode"
    alone = disagg(stages("decode"), stageOrder="prefill-first").schedule(ask(), candidates)
    assert (alone.plan, alone.failures) == ("decode-only", ())


@pytest.mark.parametrize(
    ("order", "seen"),
    [
        ("decode-first", [("decode", None), ("encode", 0), ("prefill", 0)]),
        ("prefill-first", [("prefill", None), ("encode", 1), ("decode", 1)]),
    ],
)
def test_a_later_stage_sees_where_the_earlier_one_went(order: str, seen: list[tuple[str, int | None]]) -> None:
    told: list[tuple[str, int | None]] = []

    def notes(name: str) -> Filter:
        @filter_(name, params=NoParams)
        def keep(request: Request, candidates: Candidates, params: NoParams) -> Bools:
            """Note it."""
            told.append((name, request.peer))
            return np.ones(len(candidates), np.bool_)

        return made(keep)

    kinds = {"decode": decode_role, "prefill": prefill_role, "encode": encode_role}
    profiles = [profile(name, made(role), notes(name)) for name, role in kinds.items()]
    deciders = {"encode": "media"} if order == "prefill-first" else EPD["deciders"]
    request = read(
        ((":path", b"/v1/chat/completions"),),
        b'{"model":"m","messages":[{"role":"user","content":[{"type":"input_audio"}]}]}',
    )
    disagg(profiles, stageOrder=order, deciders=deciders).schedule(request, roles("decode", "prefill", "encode"))
    assert told == seen


def test_the_prompt_counts_where_it_is_computed_and_both_are_believed_to_hold_it() -> None:
    producer, _ = with_prefix()
    choosing = handled(handlers.disaggregated, PD, stages("decode", "prefill"), [producer])
    candidates, request = roles("decode", "prefill"), ask("ab c" * 64)
    first = choosing.schedule(request, candidates)
    assert first.prefill is not None
    assert (first.matched_tokens, first.prefill.matched_tokens) == (0.0, 0.0)
    assert first.prefill.prompt_tokens == first.prompt_tokens == request.tokens
    again = choosing.schedule(request, candidates)
    assert again.prefill is not None
    assert (again.matched_tokens, again.prefill.matched_tokens) == (64.0, 64.0)


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({"prefillDeciderPluginName": "always", "encodeDeciderPluginName": "media"}, ("decode", "prefill", "encode")),
        ({"deciderPluginName": "always", "encodeDeciderPluginName": "media"}, ("decode", "prefill", "encode")),
        (
            {
                "decodeProfile": "d",
                "prefillProfile": "p",
                "encodeProfile": "e",
                "prefillDeciderPluginName": "always",
                "encodeDeciderPluginName": "media",
            },
            ("d", "p", "e"),
        ),
        ({"profiles": {"decode": "d", "prefill": "p", "encode": "e"}, **EPD}, ("d", "p", "e")),
    ],
)
def test_older_flat_names_mean_the_same(parameters: dict[str, Any], names: tuple[str, ...]) -> None:
    by_role = zip(names, (decode_role, prefill_role, encode_role), strict=True)
    profiles = [profile(name, made(role)) for name, role in by_role]
    decision = disagg(profiles, **parameters).schedule(IMAGE, roles("decode", "prefill", "encode"))
    assert decision.plan == "encode-prefill-decode"
    assert decision.profile == names[0]
    flat = {name for name in parameters if name not in ("profiles", "deciders")}
    assert flat <= handlers.DisaggParams.instead.keys()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"decodeProfile": "d", "profiles": {"decode": "e"}}, "older names and profiles or deciders are given"),
        ({"deciderPluginName": "always", "deciders": {"encode": "media"}}, "older names and"),
        ({"stageOrder": "prefill-first", "deciders": {"prefill": "always"}}, "leave its decider out"),
        ({"stageOrder": "prefill-first", "deciderPluginName": "always"}, "leave its decider out"),
        ({"stageOrder": "encode-first"}, "Invalid enum value 'encode-first'"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(parameters, handlers.DisaggParams)


def test_a_decode_profile_or_a_decider_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no profile is named 'decode' \(there are: prefill\)"):
        disagg(stages("prefill"))
    with pytest.raises(
        ConfigError, match=r"no decider is named 'gone' \(there are: always, media, fails, never, prefix\)"
    ):
        disagg(stages("decode", "prefill"), deciders={"prefill": "gone"})


def test_a_prompt_that_the_decode_endpoint_holds_is_not_computed_elsewhere() -> None:
    producer, _ = with_prefix()
    parameters = {"deciders": {"prefill": "prefix"}}
    choosing = handled(handlers.disaggregated, parameters, stages("decode", "prefill"), [producer])
    candidates, prompt = roles("decode", "prefill"), "ab c" * 64 * 2  # 128 tokens and one
    assert choosing.schedule(ask(prompt), candidates).plan == "prefill-decode"
    assert choosing.schedule(ask(prompt), candidates).plan == "decode-only"
    assert choosing.schedule(ask(prompt + "ab c" * 62), candidates).plan == "decode-only"  # 63 more
    assert choosing.schedule(ask(prompt + "ab c" * 63), candidates).plan == "prefill-decode"


def test_a_decision_in_stages_renders_as_its_record() -> None:
    choosing = disagg(stages("decode", "prefill", "encode"), **EPD)
    rendered = choosing.schedule(IMAGE, roles("decode", "prefill")).render()
    record = ParseDict(json.loads(json.dumps(rendered)), decision_pb2.Decision())
    assert record.plan == "prefill-decode"
    assert list(record.prefill.endpoints) == [address(1)]
    assert {each.address: each.excluded_by for each in record.prefill.candidates} == {
        address(0): "prefill-filter",
        address(1): "",
    }
    assert not record.HasField("encode")
    assert [(each.plugin, each.reason) for each in record.failures] == [
        ("encode", "no endpoint may serve this request: of 2 endpoints, encode-filter left out 2")
    ]


# -- pd-profile-handler ------------------------------------------------------------------------------------------------


def test_the_older_handler_prefills_and_decodes() -> None:
    choosing = handled(handlers.prefill_decode, {"deciderPluginName": "always"}, stages("prefill", "decode"))
    decision = choosing.schedule(ask(), roles("decode", "prefill"))
    assert (decision.plan, decision.endpoints) == ("prefill-decode", (address(0),))
    assert decision.set_headers == (("x-prefiller-host-port", address(1).encode()),)
    with pytest.raises(ConfigError, match="no decider is named 'prefix-based-pd-decider'"):
        handled(handlers.prefill_decode, {}, stages("prefill", "decode"))


def test_the_older_handler_may_go_by_the_primary_port() -> None:
    parameters = {"deciderPluginName": "always", "primaryPort": 8100}
    choosing = handled(handlers.prefill_decode, parameters, stages("prefill", "decode"))
    decision = choosing.schedule(ask(), roles("decode", "prefill"))
    assert decision.endpoints == ("192.168.1.1:8100",)
    assert decision.set_headers == (
        ("x-prefiller-host-port", address(1).encode()),
        ("x-data-parallel-host-port", address(0).encode()),
    )


# -- data-parallel-profile-handler -------------------------------------------------------------------------------------


def ranks() -> Candidates:
    """Two ranks of one pod, IPv6; the second one is idle."""
    table = EndpointTable()
    for rank, waiting in enumerate((5.0, 0.0)):
        slot = table.put(Endpoint(f"default/pod-rank-{rank}", f"[fd00::1]:{8000 + rank}"), 0.0)
        table.page_told(slot, table.generation(slot), Page(waiting=waiting), NOW)
    return table.candidates(NOW)


def test_a_rank_is_reached_by_its_pods_primary_port_and_there_are_no_fallbacks() -> None:
    choosing = handled(handlers.data_parallel, {}, [profile("any", endpoints=2)])
    decision = choosing.schedule(ask(), ranks())
    assert decision.endpoints == ("[fd00::1]:8000",)
    assert decision.set_headers == (("x-data-parallel-host-port", b"[fd00::1]:8001"),)
    assert (decision.first, decision.order.tolist(), decision.plan) == (1, [1], "")


def test_ranks_are_of_one_profile_and_ports_are_ports() -> None:
    with pytest.raises(ConfigError, match="it runs one profile, not 2"):
        handled(handlers.data_parallel, {}, stages("decode", "prefill"))
    for port in (0, 65536):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"primaryPort": port}, handlers.DataParallelParams)


# -- header-profile-handler --------------------------------------------------------------------------------------------


def wanting(profile_: bytes | None) -> Request:
    headers: Headers = () if profile_ is None else (("epp-profile", profile_),)
    return read(((":path", b"/v1/completions"), *headers), b'{"model":"m","prompt":"hello"}')


@pytest.mark.parametrize(("header", "slot"), [(None, 0), (b"", 0), (b"decode", 0), (b"prefill", 1), (b" encode ", 2)])
def test_a_header_chooses_the_profile_and_its_absence_the_default_one(header: bytes | None, slot: int) -> None:
    choosing = handled(handlers.header_profile, {}, stages("prefill", "decode", "encode"))
    decision = choosing.schedule(wanting(header), roles("decode", "prefill", "encode"))
    assert (decision.first, decision.plan, decision.set_headers) == (slot, "", ())


def test_a_header_that_names_no_profile_is_a_400_that_says_which_there_are() -> None:
    choosing = handled(handlers.header_profile, {"defaultProfile": "prefill"}, stages("decode", "prefill"))
    with pytest.raises(BadRequest) as caught:
        choosing.schedule(wanting(b"Decode"), roles("decode", "prefill"))
    assert caught.value.message == ("header EPP-Profile: no profile is named 'Decode' (there are: prefill, decode)")
    with pytest.raises(ConfigError, match=r"no profile is named 'gone' \(there are: decode\)"):
        handled(handlers.header_profile, {"defaultProfile": "gone"}, stages("decode"))
