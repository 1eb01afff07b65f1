"""Profile handlers: which profiles run for a request, and what their decisions come to.

In: a request, and a way to run a profile by name. Out: a `Plan`: where the request goes, who works for it there, and
the headers by which they find each other.
Rules here:
- The destination of a disaggregated request is its decode endpoint; whoever computes the prompt or the media in its
  place is told to the sidecar in front of it, by x-prefiller-host-port and x-encoder-hosts-ports.
- A stage that was wanted and cannot be had, because nobody is there or everybody is full, is named in the plan and
  in the decision, and the destination does its work itself. No decode endpoint is 503: nothing else can answer.
- A stage that comes to the destination itself is no stage: the KV cache would be sent to where it is.
- Each stage is told what an earlier one came to (`request.peer`), so that two of them may be chosen as a pair.
Rejected: the prompt and the answer from one profile run over pairs of endpoints (all pairs of 100 and 100 endpoints
are 10,000 rows; what depends on the pair is one filter or scorer of the later stage).
Source: llm-d router, profile handlers; `stageOrder`, `profiles`, `deciders` and the older flat names as there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

from epp.dialects.request import Request
from epp.errors import BadRequest, ConfigError, NoEndpoint, Refusal, Saturated
from epp.headers import text
from epp.scheduling.decision import Failure, Plan, Stage
from epp.scheduling.plugin import (
    Context,
    Decider,
    Params,
    ProfileRef,
    Ref,
    RunProfile,
    deprecated,
    experimental,
    handler,
)

PREFILLER: Final = "x-prefiller-host-port"
ENCODERS: Final = "x-encoder-hosts-ports"
DATA_PARALLEL: Final = "x-data-parallel-host-port"

Port = Annotated[int, Meta(ge=1, le=65535)]


class StageProfiles(Params, frozen=True):
    """Names of the profiles that choose each stage's endpoint."""

    decode: Annotated[str, ProfileRef(required=True)] = "decode"
    """Who answers: the request is sent there."""
    prefill: Annotated[str, ProfileRef()] = "prefill"
    """Who computes the prompt. Without such a profile the stage never runs."""
    encode: Annotated[str, ProfileRef()] = "encode"
    """Who computes images, audio and video. Without such a profile the stage never runs."""


class StageDeciders(Params, frozen=True):
    """Names of the deciders that say, per request, whether a stage runs."""

    prefill: Annotated[str, Ref("decider")] = ""
    """Empty: the stage never runs. With prefill-first it always runs, and none may be named."""
    encode: Annotated[str, Ref("decider")] = ""
    """Empty: the stage never runs."""


class DisaggParams(Params, frozen=True):
    stage_order: Literal["decode-first", "prefill-first"] = "decode-first"
    """decode-first: decode, encode, prefill, and the deciders see the decode endpoint. prefill-first: prefill, encode,
    decode, so that the decode endpoint may be chosen to suit the prefill endpoint."""
    profiles: StageProfiles = StageProfiles()
    """Which profile chooses which stage's endpoint."""
    deciders: StageDeciders = StageDeciders()
    """Which decider says whether a stage runs."""
    decode_profile: Annotated[str, ProfileRef()] = ""
    """The older name of profiles.decode."""
    prefill_profile: Annotated[str, ProfileRef()] = ""
    """The older name of profiles.prefill."""
    encode_profile: Annotated[str, ProfileRef()] = ""
    """The older name of profiles.encode."""
    prefill_decider_plugin_name: Annotated[str, Ref("decider")] = ""
    """The older name of deciders.prefill."""
    encode_decider_plugin_name: Annotated[str, Ref("decider")] = ""
    """The older name of deciders.encode."""
    decider_plugin_name: Annotated[str, Ref("decider")] = ""
    """An even older name of deciders.prefill."""

    instead: ClassVar[Mapping[str, str]] = {
        "decodeProfile": "profiles.decode",
        "prefillProfile": "profiles.prefill",
        "encodeProfile": "profiles.encode",
        "prefillDeciderPluginName": "deciders.prefill",
        "encodeDeciderPluginName": "deciders.encode",
        "deciderPluginName": "deciders.prefill",
    }

    def __post_init__(self) -> None:
        old = [name for name in self.__struct_fields__[3:] if getattr(self, name)]
        if old and (self.profiles != StageProfiles() or self.deciders != StageDeciders()):
            raise ValueError("older names and profiles or deciders are given: write all of them under the newer ones")
        if self.stage_order == "prefill-first" and self.stages()[1].prefill:
            raise ValueError("with prefill-first the prefill stage always runs: leave its decider out")

    def stages(self) -> tuple[StageProfiles, StageDeciders]:
        """Profiles and deciders, whichever names they were given under."""
        usual = StageProfiles()
        profiles = StageProfiles(
            decode=self.decode_profile or self.profiles.decode or usual.decode,
            prefill=self.prefill_profile or self.profiles.prefill or usual.prefill,
            encode=self.encode_profile or self.profiles.encode or usual.encode,
        )
        deciders = StageDeciders(
            prefill=self.prefill_decider_plugin_name or self.decider_plugin_name or self.deciders.prefill,
            encode=self.encode_decider_plugin_name or self.deciders.encode,
        )
        return profiles, deciders


class Disaggregated:
    """Serve a request in up to three stages, each on an endpoint of its own: encode, prefill, decode.

    The request goes to the decode endpoint, with the others in its headers. A stage runs where its decider says so, and
    with stageOrder prefill-first the prefill stage always does. Where a stage has no endpoint, or it would be the
    decode endpoint itself, the decode endpoint does its work; the first case is named in the decision. Without a decode
    endpoint the request is refused with 503.
    """

    def __init__(self, params: DisaggParams, context: Context) -> None:
        names, deciders = params.stages()
        _require(names.decode, context)
        self._names = names
        self._there = frozenset(context.profiles)
        self._prefill = context.decider(deciders.prefill) if deciders.prefill else None
        self._encode = context.decider(deciders.encode) if deciders.encode else None
        self._prefill_first = params.stage_order == "prefill-first"
        self.profiles = tuple(name for name in (names.decode, names.prefill, names.encode) if name in self._there)

    def plan(self, request: Request, run: RunProfile) -> Plan:
        failures: list[Failure] = []
        if self._prefill_first:
            prefill = self._helper(self._names.prefill, run, failures) if self._names.prefill in self._there else None
            request.peer = None if prefill is None else prefill.decision.first
            encode = self._decided(self._encode, self._names.encode, request, None, run, failures)
            decode = run(self._names.decode)
        else:
            decode = run(self._names.decode)
            request.peer = decode.decision.first
            encode = self._decided(self._encode, self._names.encode, request, decode, run, failures)
            prefill = self._decided(self._prefill, self._names.prefill, request, decode, run, failures)
        return staged(decode, prefill, encode, tuple(failures))

    def _decided(
        self,
        decider: Decider | None,
        name: str,
        request: Request,
        decode: Stage | None,
        run: RunProfile,
        failures: list[Failure],
    ) -> Stage | None:
        """The stage's endpoint, if its decider wants one; a decider that fails wants none, and is named."""
        if decider is None:
            return None
        try:
            wanted = decider.decide(request, None if decode is None else decode.decision)
        except Refusal:
            raise
        except Exception as error:
            failures.append(Failure.of(decider.name, error))
            return None
        return self._helper(name, run, failures) if wanted else None

    def _helper(self, name: str, run: RunProfile, failures: list[Failure]) -> Stage | None:
        """An endpoint that works for the destination; None: there is none, which is noted."""
        if name not in self._there:
            failures.append(Failure(name, "no profile has this name"))
            return None
        try:
            return run(name)
        except (NoEndpoint, Saturated) as error:
            failures.append(Failure(name, error.message))
            return None


def staged(decode: Stage, prefill: Stage | None, encode: Stage | None, failures: tuple[Failure, ...] = ()) -> Plan:
    """The plan of these stages, with the headers toward the sidecar."""
    destination = decode.decision.first
    if prefill is not None and prefill.decision.first == destination:
        prefill = None
    if encode is not None and encode.decision.first == destination:
        encode = None
    headers: list[tuple[str, bytes]] = []
    if prefill is not None:
        headers.append((PREFILLER, prefill.decision.endpoints[0].encode()))
    if encode is not None:
        headers.append((ENCODERS, ",".join(encode.decision.endpoints).encode()))
    return Plan(decode, prefill, encode, tuple(headers), PLANS[encode is not None, prefill is not None], failures)


PLANS: Final = {
    (False, False): "decode-only",
    (False, True): "prefill-decode",
    (True, False): "encode-decode",
    (True, True): "encode-prefill-decode",
}
"""Name of a plan, as the counter of decisions has it: by whether there is an encode and a prefill endpoint."""


class PdParams(Params, frozen=True):
    decode_profile: Annotated[str, ProfileRef(required=True)] = "decode"
    """The profile that chooses who answers."""
    prefill_profile: Annotated[str, ProfileRef()] = "prefill"
    """The profile that chooses who computes the prompt."""
    decider_plugin_name: Annotated[str, Ref("decider")] = "prefix-based-pd-decider"
    """The decider that says whether the prefill stage runs; it must be declared."""
    primary_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    """As of data-parallel-profile-handler; 0: each rank is reached at its own port."""
    prefix_plugin_type: str = ""
    """Kept for old configurations: the decider knows who holds what."""
    prefix_plugin_name: str = ""
    """Kept for old configurations: the decider knows who holds what."""
    prefix_match_info_producer_name: str = ""
    """Kept for old configurations: the decider knows who holds what."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        unread = ("prefixPluginType", "prefixPluginName", "prefixMatchInfoProducerName")
        return {name: "the decider knows who holds what" for name in unread if name in given}


class PrefillDecode:
    """Serve a request in up to two stages: prefill and decode. The older form of disagg-profile-handler."""

    def __init__(self, params: PdParams, context: Context) -> None:
        newer = DisaggParams(
            profiles=StageProfiles(decode=params.decode_profile, prefill=params.prefill_profile),
            deciders=StageDeciders(prefill=params.decider_plugin_name),
        )
        self._stages = Disaggregated(newer, context)
        self._port = params.primary_port
        self.profiles = self._stages.profiles

    def plan(self, request: Request, run: RunProfile) -> Plan:
        plan = self._stages.plan(request, run)
        return by_primary_port(plan, self._port) if self._port else plan


class DataParallelParams(Params, frozen=True):
    primary_port: Port = 8000
    """Port of each pod's sidecar, which hands the request on to the rank that the header names."""


class DataParallel:
    """Send every request to its pod's primary port, with the chosen rank in the header x-data-parallel-host-port.

    There must be one profile. There are no fallbacks, for the header names a rank of one pod. The request counts on the
    rank.
    """

    def __init__(self, params: DataParallelParams, context: Context) -> None:
        if len(context.profiles) != 1:
            raise ConfigError(f"it runs one profile, not {len(context.profiles)}: keep the one that chooses the rank")
        self._port = params.primary_port
        self.profiles: tuple[str, ...] = context.profiles

    def plan(self, request: Request, run: RunProfile) -> Plan:
        return by_primary_port(Plan(run(self.profiles[0])), self._port)


def by_primary_port(plan: Plan, port: int) -> Plan:
    """The same plan, with its destination behind its pod's primary port."""
    decision = plan.primary.decision
    rank = decision.endpoints[0]
    decision.endpoints = (f"{rank.rpartition(':')[0]}:{port}",)
    decision.order = decision.order[:1]
    return msgspec.structs.replace(plan, set_headers=(*plan.set_headers, (DATA_PARALLEL, rank.encode())))


class HeaderProfileParams(Params, frozen=True):
    header_name: Annotated[str, Meta(min_length=1)] = "EPP-Profile"
    """The request header that names the profile."""
    default_profile: Annotated[str, ProfileRef(required=True)] = "decode"
    """The profile for a request without the header."""


class HeaderProfile:
    """Let a request header choose the one profile that runs.

    A header that names no profile is refused with 400, and with the names that there are.
    """

    def __init__(self, params: HeaderProfileParams, context: Context) -> None:
        _require(params.default_profile, context)
        self._header, self._shown = params.header_name.lower(), params.header_name
        self._default = params.default_profile
        others = (name for name in context.profiles if name != params.default_profile)
        self.profiles = (params.default_profile, *others)

    def plan(self, request: Request, run: RunProfile) -> Plan:
        name = text(request.headers, self._header) or self._default
        if name not in self.profiles:
            there = ", ".join(self.profiles)
            raise BadRequest(f"header {self._shown}: no profile is named {name[:253]!r} (there are: {there})")
        return Plan(run(name))


def _require(profile: str, context: Context) -> None:
    if profile not in context.profiles:
        there = ", ".join(context.profiles) or "none"
        raise ConfigError(f"no profile is named {profile!r} (there are: {there}): add it to schedulingProfiles")


disaggregated = handler("disagg-profile-handler", params=DisaggParams)(Disaggregated)
prefill_decode = deprecated("type disagg-profile-handler with deciders.prefill")(
    handler("pd-profile-handler", params=PdParams)(PrefillDecode)
)
data_parallel = deprecated("one of the pool's targetPorts for each rank, and no handler")(
    handler("data-parallel-profile-handler", params=DataParallelParams)(DataParallel)
)
header_profile = experimental(handler("header-profile-handler", params=HeaderProfileParams)(HeaderProfile))
