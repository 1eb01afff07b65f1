"""Deciders: whether a stage of disaggregated serving is worth its transfer, for one request.

In: a request, and what the decode stage came to, if it ran already. Out: yes or no.
Rules here: what is not known is no reason to disaggregate: the decode endpoint can do everything.
Source: llm-d router, disaggregation deciders.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Final

from msgspec import Meta

from epp.dialects.request import Request
from epp.scheduling.decision import Decision
from epp.scheduling.plugin import PREFIX_MATCH, NoParams, Params, decider

MEDIA: Final = frozenset(("image_url", "video_url", "audio_url", "input_audio"))
"""Kinds of a message's parts that an encoder computes: those that the sidecar takes out of chat completions."""


@decider("always-disagg-pd-decider", params=NoParams)
def always(request: Request, decode: Decision | None, params: NoParams) -> bool:
    """Always compute the prompt on a prefill endpoint."""
    return True


class PrefixBasedParams(Params, frozen=True):
    non_cached_tokens: Annotated[int, Meta(ge=0)] = 0
    """Prompt tokens that the decode endpoint does not hold, from which on they are computed elsewhere; 0: never."""
    prompt_tokens: Annotated[int, Meta(ge=0)] = 0
    """Prompt tokens, held or not, below which they are never computed elsewhere."""

    def idle(self, given: Collection[str]) -> dict[str, str]:
        if self.non_cached_tokens or "promptTokens" not in given:
            return {}
        return {"promptTokens": "nonCachedTokens is 0, so no prompt is computed elsewhere"}


@decider("prefix-based-pd-decider", params=PrefixBasedParams, needs=(PREFIX_MATCH,))
def prefix_based(request: Request, decode: Decision | None, params: PrefixBasedParams) -> bool:
    """Compute the prompt on a prefill endpoint if the decode endpoint would have enough of it to compute.

    True if the prompt has at least promptTokens, and at least nonCachedTokens of them are not cached on the decode
    endpoint that was chosen. Both are estimates unless the body holds token ids.
    """
    if decode is None or not params.non_cached_tokens:
        return False
    return decode.prompt_tokens >= params.prompt_tokens and decode.uncached >= params.non_cached_tokens


@decider("always-disagg-multimodal-decider", params=NoParams)
def multimodal(request: Request, decode: Decision | None, params: NoParams) -> bool:
    """Encode on an encode endpoint whatever images, audio and video the messages have; a text goes without.

    Looks for parts of the types image_url, video_url, audio_url and input_audio.
    """
    return any(part.kind in MEDIA for message in request.messages for part in message.parts)
