"""What a request's headers say of who asks.

In: a request. Out: its fairness id and session, where it has none of its own.
Rules here: what the client says for the picker (the fairness header) comes before what its agent says in passing; the
agent's headers are the client's, so they go on to the model server.
Source: llm-d router, agent-identity (names and order of the headers).
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from epp.dialects.request import Request
from epp.headers import FAIRNESS_ID, text
from epp.scheduling.plugin import Params, experimental, processor

AGENTS: Final = ("x-claude-code-session-id", "x-session-affinity", "session-id", "session_id")
"""Headers by which agents name their session: Claude Code, OpenCode, Codex, and Codex before 0.131."""


class AgentParams(Params, frozen=True):
    additional_session_headers: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    """Headers that are looked at before those of the known agents, in this order."""


@experimental
@processor("agent-identity", params=AgentParams)
def agent_identity(request: Request, params: AgentParams) -> None:
    """Let all turns of an agent's session count as one flow, and be one session.

    The first header that is not empty counts, of additionalSessionHeaders, then x-claude-code-session-id,
    x-session-affinity, session-id and session_id. The client's own fairness header comes before them, and so does a
    session that another plugin has found.
    """
    names = (*map(str.lower, params.additional_session_headers), *AGENTS)
    found = next((value for name in names if (value := text(request.headers, name))), "")
    if not found:
        return
    if not text(request.headers, *FAIRNESS_ID):
        request.fairness_id = found
    request.session = request.session or found
