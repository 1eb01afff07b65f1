from epp.dialects.request import Request
from epp.endpoints.table import Bools, Candidates
from epp.scheduling.plugin import Params, filter_


class Limit(Params, frozen=True):
    most_running: int = 64
    """Requests that an endpoint may run before it gets more; what is not known is no reason to leave it out."""


@filter_("running-limit-filter", params=Limit, needs=("running",))
def running_limit(request: Request, candidates: Candidates, params: Limit) -> Bools:
    """Keep endpoints that run fewer requests than mostRunning; without any, the request is refused with 503."""
    running, known = candidates.column("running")
    return ~known | (running < params.most_running)
