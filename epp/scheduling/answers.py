"""What plugins add when a response begins, and whether a request names its endpoints itself.

In: plugins' hooks, a request, an answer. Out: headers that Envoy can set; yes or no.
Rules here: what a plugin would set is checked before Envoy sees it: there a malformed header is a 500. A plugin that
fails sets nothing and pins nothing, and harms no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from epp.dialects.request import Request
from epp.headers import Headers
from epp.scheduling.plugin import Answer, Answered, Pins


def headers_of_answer(
    hooks: Sequence[tuple[str, Answered]], request: Request, answer: Answer, broke: Callable[[str, Exception], None]
) -> Headers:
    """Headers that plugins set on a response; of two plugins that set the same one the later wins.

    Args:
        hooks: with each plugin's name.
        broke: told of a plugin that raises, or returns what Envoy would fail the response for; it sets nothing.
    """
    found: dict[str, bytes] = {}
    for name, answered in hooks:
        try:
            found |= _sound(answered(request, answer))
        except Exception as error:
            broke(f"plugin {name} at a response", error)
    return tuple(found.items())


def pinned(hooks: Sequence[tuple[str, Pins]], request: Request, broke: Callable[[str, Exception], None]) -> bool:
    """Whether a plugin says that the request names its endpoints itself. Arguments as of `headers_of_answer`."""
    for name, pins in hooks:
        try:
            if pins(request):
                return True
        except Exception as error:
            broke(f"plugin {name} at a request", error)
    return False


HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
"""A token of RFC 9110, in lower case; no pseudo-header is one."""
NOT_IN_A_VALUE: Final = re.compile(rb"[\0\r\n]")
FRAMING: Final = frozenset(("connection", "content-length", "te", "trailer", "transfer-encoding", "upgrade"))
"""How long a response is, and how it goes on, is not a plugin's to say."""


def _sound(headers: Headers) -> dict[str, bytes]:
    """Raises ValueError for what cannot be set; TypeError for what is no text and bytes."""
    for name, value in headers:
        if not HEADER_NAME.fullmatch(name) or name in FRAMING or NOT_IN_A_VALUE.search(value):
            raise ValueError(f"cannot set the response header {name!r} to {value!r}")
    return dict(headers)
