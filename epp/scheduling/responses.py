"""The Responses API keeps answers on the server that gave them: what goes on from one must go there.

In: a request; later the id by which its server keeps the response. Out: a mask.
Rules here:
- Ids are learned from responses, so only where the proxy shows their bodies, and only when they end (a stream that
  the client leaves after its last event has ended). Each picker knows what it has seen itself.
- At most MOST_SESSIONS responses are remembered, by a digest; the oldest give way. Servers forget them by themselves:
  they are asked, and say so.
Rejected: a scorer (any other server answers that there is no such response); asking all servers.
Source: OpenAI API reference, Responses; vLLM keeps them in memory (VLLM_ENABLE_RESPONSES_API_STORE).
"""

from __future__ import annotations

import re
from hashlib import blake2b
from math import inf
from typing import Final

import numpy as np

from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates, EndpointTable
from epp.scheduling.plugin import Context, NoParams, filter_
from epp.scheduling.sessions import Bindings

OF_PATH: Final = re.compile(r"/responses/([^/]+)")
"""GET, DELETE, and what may stand behind the id: cancel, input_items."""


class ResponseAffinity:
    """Keep the endpoint that holds the response that a Responses call goes on from (previous_response_id), or asks for.

    Everybody is kept where the request names no response, where nothing is known of it, and where its endpoint is no
    candidate, because it is gone, not ready or left out by a plugin before this one. The ext_proc filter must show the
    bodies of responses (response_body_mode FULL_DUPLEX_STREAMED): ids are learned from them.
    """

    def __init__(self, params: NoParams, context: Context) -> None:
        self._held = Bindings(inf)

    def __call__(self, request: Request, candidates: Candidates, params: NoParams) -> Bools:
        everybody = np.ones(len(candidates), np.bool_)
        wanted = request.previous or _of_path(request.path)
        slot = self._held.find(_key(wanted), candidates.table, candidates.now) if wanted else None
        if slot is None:
            return everybody
        kept: Bools = candidates.slots == slot
        return kept if kept.any() else everybody

    def stored(self, response: str, slot: int, table: EndpointTable, now: float) -> None:
        self._held.bind(_key(response), slot, table, now)


def _of_path(path: str) -> str:
    found = OF_PATH.search(path)
    return found[1] if found else ""


def _key(response: str) -> bytes:
    return blake2b(response.encode(), digest_size=16).digest()


response_affinity = filter_("response-affinity", params=NoParams)(ResponseAffinity)
