"""Plugins for conformance tests: a request says where it wants to go, a response says where it went.

In: a request's own header, and how its response begins. Out: a mask of the endpoints that the header names, and a
header on the response.
Rules here:
- Neither does anything unless a configuration asks for it (the filter in a profile), so that nobody can steer the
  traffic of a picker whose operator did not.
- A header that names endpoints comes before the gateway's subset, ejection and slow start: a test that names a pod
  means it.
- The order of the header is not kept: a mask has none, and upstream's pickers shuffle what its filter put in order.
Rejected: nobody for a request without the header (upstream's filter, so 429): the suite sends some without, and only
bodyless ones escape there, by a path that asks no filter; the light-weight picker's request header X-Echo-Set-Header,
which makes the suite's echo servers write the response's header: that picker's way, never this plugin's.
Source: Gateway API Inference Extension, test plugins of the full picker (to v1.5) and its light-weight picker.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from epp.dialects.request import Request
from epp.endpoints.subset import in_subset
from epp.endpoints.table import Bools, Candidates
from epp.headers import Headers
from epp.scheduling.plugin import Answer, Context, NoParams, filter_, processor

SELECTION: Final = "test-epp-endpoint-selection"
SERVED: Final = "x-conformance-test-served-endpoint"
NOT_TOLD: Final = b"fail: missing destination endpoint served metadata"


class HeaderBased:
    """Keep the endpoints that the request's header test-epp-endpoint-selection names; without one, all of them.

    The header is a list with commas: ip:port is one endpoint, an ip alone all ports of its pod, IPv6 in brackets.
    """

    def __init__(self, params: NoParams, context: Context) -> None:
        pass

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Bools:
        named = _named(request)
        return in_subset(candidates, named) if named else np.ones(len(candidates), np.bool_)

    def pins(self, request: Request) -> bool:
        return bool(_named(request))


class ServedVerifier:
    """Set the response header x-conformance-test-served-endpoint to the endpoint that the proxy says it used.

    Where the proxy tells none, the header says so: fail: missing destination endpoint served metadata. No profile
    needs to list it.
    """

    def __init__(self, params: NoParams, context: Context) -> None:
        pass

    def __call__(self, request: Request, params: NoParams) -> None:
        """Before the response there is nothing to do."""

    def answered(self, request: Request, answer: Answer) -> Headers:
        return ((SERVED, NOT_TOLD if answer.served is None else answer.served.encode()),)


def _named(request: Request) -> tuple[str, ...]:
    """Every entry of every such header, in order; blank ones do not count."""
    values = (value.decode("latin-1") for name, value in request.headers if name == SELECTION)
    return tuple(entry.strip() for value in values for entry in value.split(",") if entry.strip())


header_based = filter_("header-based-testing-filter", params=NoParams)(HeaderBased)
served_verifier = processor("destination-endpoint-served-verifier", params=NoParams)(ServedVerifier)
