"""What leaves endpoints out before any profile: the gateway's subset, failures, and being new.

In: candidates. Out: those that are left, and who left out the others.
Rules here:
- Nobody outside the gateway's subset ever serves a request.
- Who is ejected or new is left out for others' sake, and comes back in where no profile finds anybody else.
"""

from __future__ import annotations

from epp.endpoints.ejection import Ejection
from epp.endpoints.slowstart import anyone_new, slow_start
from epp.endpoints.subset import in_subset
from epp.endpoints.table import Candidates, EndpointTable
from epp.errors import NoEndpoint
from epp.scheduling.decision import Exclusion

Left = tuple[Candidates, list[Exclusion]]


def allowed(candidates: Candidates, subset: tuple[str, ...] | None) -> Left:
    """Those of the gateway's subset; None: there is none. Raises NoEndpoint."""
    if not len(candidates):
        raise NoEndpoint("the pool has no endpoints")
    if subset is None:
        return candidates, []
    mask = in_subset(candidates, subset)
    if not mask.any():
        raise NoEndpoint("none of the pool's endpoints is in the subset that the gateway allows")
    return candidates.keep(mask), [Exclusion("subset", candidates.slots[~mask])]


def preferred(left: Left, table: EndpointTable, ejection: Ejection, window: float, now: float) -> Left:
    """Those among them that have not failed lately, and are not new and busy enough already.

    Args:
        window: seconds in which a new endpoint's share grows to its full size.
    """
    candidates, exclusions = left[0], [*left[1]]
    if ejection.anyone(now):
        out = ejection.out(candidates.slots, now)
        if out.any():
            exclusions.append(Exclusion("ejected", candidates.slots[out]))
            candidates = candidates.keep(~out)
    if anyone_new(table, window, now):
        warm = slow_start(candidates, window)
        if not warm.all():
            exclusions.append(Exclusion("slow-start", candidates.slots[~warm]))
            candidates = candidates.keep(warm)
    return candidates, exclusions
