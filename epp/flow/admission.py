"""Who is turned away from a full pool, where nothing queues here.

In: a request below priority 0, and the endpoints that may serve it. Out: how full they are, or a refusal.
Rules here:
- Only a request below priority 0 is ever refused; everyone else passes, and is not measured.
- What is full are the endpoints that this request may use: the pool without those that guards left out.
- No endpoint at all is not a full pool: that is 503, and the scheduler's to say.
Source: llm-d router, admission without flow control (429, `rejected-saturated`).
"""

from __future__ import annotations

from epp.dialects.request import Request
from epp.endpoints.table import Candidates
from epp.errors import Saturated
from epp.flow.saturation import Detector, Saturation


def admit(request: Request, candidates: Candidates, detector: Detector) -> Saturation | None:
    """Let a sheddable request (priority below 0) pass, or refuse it.

    Returns:
        How full its candidates are; None: there are none.

    Raises:
        Saturated: they are full.
    """
    assert request.priority < 0
    if not len(candidates):
        return None
    saturation = detector.saturation(candidates)
    if saturation.value >= 1.0:
        raise Saturated(_reason(request, saturation))
    return saturation


def _reason(request: Request, saturation: Saturation) -> str:
    objective = f" (objective {request.objective[:253]!r})" if request.objective else ""
    unknown = (
        f", of which {saturation.unknown} counted as full for want of recent metrics" if saturation.unknown else ""
    )
    return (
        f"the model servers are saturated, and this request's priority is {request.priority}{objective}: try again "
        f"later, or use an objective with a priority of 0 or more; saturation is {saturation.value:.2f} over "
        f"{saturation.endpoints} endpoints{unknown}"
    )
