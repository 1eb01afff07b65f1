"""Sessions: requests that belong together go to the endpoint that has served them before.

In: a request's headers. Out: a mask or scores; and, by the stateless strategy, a header on the response.
Rules here:
- encoded_endpoint_header keeps nothing: the response names its endpoint, and the client sends that name back. It is
  base64 of the endpoint's name, so a client can choose its endpoint, but only one that it may use anyway.
- session_id keeps which endpoint each session went to last: at most MOST_SESSIONS, the least recently used give way,
  and a digest of each id, so that memory is bounded whatever clients send.
- A session without an endpoint, or whose endpoint is not among the candidates, prefers nobody.
- In a profile of disaggregated serving, a plugin pins that profile's endpoint: one instance for each profile.
Rejected: binding a session when its response begins (requests of one session that come together would be spread).
Source: llm-d router, session-affinity-filter and -scorer, session-id-producer.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections import OrderedDict
from collections.abc import Collection, Mapping
from hashlib import blake2b
from typing import Annotated, Final, Literal

import numpy as np
from msgspec import Meta

from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates, EndpointTable, Slots
from epp.headers import Headers, first, text
from epp.scheduling.plugin import Answer, Context, Params, Scores, experimental, filter_, processor, scorer

MOST_SESSIONS: Final = 100_000
"""Remembered by one plugin: 32 MB."""

HeaderName = Annotated[str, Meta(min_length=1)]
Seconds = Annotated[float, Meta(gt=0)]


class EncodedEndpoint(Params, frozen=True):
    header: HeaderName = "x-session-token"
    """Header of the response that names the endpoint, and of the next request that says it back."""


class Source(Params, frozen=True):
    """Where a session's id is found: in a header, or where another plugin has found it."""

    header: str = ""
    """Name of a request header."""
    attribute: str = ""
    """Name of what a plugin such as session-id-producer finds out about a request. Any name means: the session."""
    producer: str = ""
    """Kept for the reference's configurations: a request has one session, whoever found it."""

    def __post_init__(self) -> None:
        if bool(self.header) == bool(self.attribute):
            raise ValueError("a source of session ids has either a header or an attribute")


class SessionIds(Params, frozen=True):
    sources: Annotated[tuple[Source, ...], Meta(min_length=1)] = (Source(header="x-session-id"),)
    """Where the id is looked for; the first that has one counts."""
    eviction_ttl_seconds: Seconds = 300.0
    """How long a session is remembered after its last request."""
    eviction_sweep_seconds: Seconds = 10.0
    """Kept for the reference's configurations: what is over its time counts no more, and gives way first."""


class SessionParams(Params, frozen=True):
    strategy: Literal["encoded_endpoint_header", "session_id"] = "encoded_endpoint_header"
    """encoded_endpoint_header: the client brings the endpoint's name. session_id: the client names its session, and the
    picker remembers where it went."""
    encoded_endpoint_header_config: EncodedEndpoint = EncodedEndpoint()
    """For the strategy encoded_endpoint_header."""
    session_id_config: SessionIds = SessionIds()
    """For the strategy session_id."""
    profile_name: str = ""
    """Of encoded_endpoint_header: the profile whose endpoint the response names; empty: the destination's."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        idle: dict[str, str] = {}
        by_id = self.strategy == "session_id"
        unread = "encodedEndpointHeaderConfig" if by_id else "sessionIdConfig"
        if unread in given:
            idle[unread] = f"the strategy is {self.strategy}"
        if by_id and self.profile_name:
            idle["profileName"] = "a plugin pins the endpoint of the profile that it is in"
        return idle


class Bindings:
    """Which slot each session went to last."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._bound: OrderedDict[bytes, tuple[int, int, float]] = OrderedDict()  # a dict's first is slow to find
        """Slot, its generation, and when, by session: the latest last."""

    def __len__(self) -> int:
        return len(self._bound)

    def find(self, session: bytes, table: EndpointTable, now: float) -> int | None:
        """The session's slot; None: it has none, or was last seen too long ago, or its endpoint is gone."""
        slot, generation, at = self._bound.get(session, (0, 0, 0.0))
        if not generation or now - at > self._ttl or table.generation(slot) != generation:
            return None
        return slot

    def bind(self, session: bytes, slot: int, table: EndpointTable, now: float) -> None:
        bound = self._bound
        bound[session] = slot, table.generation(slot), now
        bound.move_to_end(session)
        oldest = next(iter(bound))
        if len(bound) > MOST_SESSIONS or now - bound[oldest][2] > self._ttl:
            del bound[oldest]


class Names:
    """Slots by the names of endpoints, and names by addresses, of the pool as it was last seen."""

    def __init__(self) -> None:
        self._listed: Slots | None = None
        self.slots: Mapping[str, int] = {}
        self.by_address: Mapping[str, str] = {}

    def see(self, table: EndpointTable) -> None:
        if self._listed is table.listed:
            return
        self._listed = table.listed
        endpoints = {slot: table.endpoint(slot) for slot in table.listed.tolist()}
        self.slots = {endpoint.name: slot for slot, endpoint in endpoints.items()}
        self.by_address = {endpoint.address: endpoint.name for endpoint in endpoints.values()}


class Affinity:
    """What filter and scorer share: which candidate a request's session has, and how it came to have it."""

    def __init__(self, params: SessionParams, context: Context) -> None:
        self._header = params.encoded_endpoint_header_config.header.lower()
        self._profile = params.profile_name
        self._by_id = params.strategy == "session_id"
        self._sources = tuple(source.header.lower() for source in params.session_id_config.sources)
        self._bindings = Bindings(params.session_id_config.eviction_ttl_seconds)
        self._names = Names()

    def pinned(self, request: Request, candidates: Candidates) -> Bools | None:
        """Where the session's endpoint is, shape (N,); None: it has none among the candidates."""
        slot = self._by_session(request, candidates) if self._by_id else self._by_name(request, candidates)
        if slot is None:
            return None
        mask: Bools = candidates.slots == slot
        return mask if mask.any() else None

    def chosen(self, request: Request, candidates: Candidates, slots: Slots) -> None:
        if self._by_id and (session := self._session(request)):
            self._bindings.bind(session, slots.item(0), candidates.table, candidates.now)

    def answered(self, request: Request, answer: Answer) -> Headers:
        name = "" if self._by_id else self._served(answer)
        return ((self._header, b64encode(name.encode())),) if name else ()

    def _by_name(self, request: Request, candidates: Candidates) -> int | None:
        self._names.see(candidates.table)
        token = first(request.headers, self._header)
        if not token:
            return None
        try:
            return self._names.slots.get(b64decode(token, validate=True).decode())
        except (NotBase64, UnicodeDecodeError):
            return None

    def _by_session(self, request: Request, candidates: Candidates) -> int | None:
        session = self._session(request)
        return self._bindings.find(session, candidates.table, candidates.now) if session else None

    def _session(self, request: Request) -> bytes:
        """A digest of the session's id; empty: the request names none."""
        for header in self._sources:
            if session := (text(request.headers, header) if header else request.session):
                return blake2b(session.encode(), digest_size=16).digest()
        return b""

    def _served(self, answer: Answer) -> str:
        """Name of the endpoint that the next request of the session should go to; empty: it has left the pool."""
        decision = answer.decision
        if not self._profile or decision.profile == self._profile:
            return answer.endpoint.name
        for helper in (decision.prefill, decision.encode):
            if helper is not None and helper.profile == self._profile:
                return self._names.by_address.get(helper.endpoints[0], "")
        return ""


class SessionFilter(Affinity):
    """Keep only the endpoint of the request's session; everybody where it has none among the candidates."""

    def __call__(self, request: Request, candidates: Candidates, params: SessionParams) -> Bools:
        mask = self.pinned(request, candidates)
        return np.ones(len(candidates), np.bool_) if mask is None else mask


class SessionScorer(Affinity):
    """Prefer the endpoint of the request's session.

    Score: 1 for it, 0 for the others; 0 for everybody where the session has none among the candidates.
    """

    def __call__(self, request: Request, candidates: Candidates, params: SessionParams) -> Scores:
        mask = self.pinned(request, candidates)
        return np.zeros(len(candidates)) if mask is None else mask.astype(np.float64)


class SessionIdParams(Params, frozen=True):
    header_name: str = ""
    """The request header that holds the id."""
    cookie_name: str = ""
    """The cookie that holds it."""

    def __post_init__(self) -> None:
        if bool(self.header_name) == bool(self.cookie_name):
            raise ValueError("write either headerName or cookieName")


@processor("session-id-producer", params=SessionIdParams)
def session_id(request: Request, params: SessionIdParams) -> None:
    """Find out which session a request belongs to, by a header or by a cookie."""
    found = text(request.headers, params.header_name.lower()) if params.header_name else _cookie(request, params)
    request.session = found or request.session


def _cookie(request: Request, params: SessionIdParams) -> str:
    """A cookie's value, of RFC 6265's `name=value; name=value`; HTTP/2 may send one header for each."""
    for name, value in request.headers:
        if name == "cookie":
            for pair in value.decode("latin-1").split(";"):
                key, _, found = pair.strip().partition("=")
                if key == params.cookie_name and found:
                    return found.strip('"')
    return ""


affinity_filter = experimental(filter_("session-affinity-filter", params=SessionParams)(SessionFilter))
affinity_scorer = experimental(scorer("session-affinity-scorer", params=SessionParams)(SessionScorer))
