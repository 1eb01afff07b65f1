"""What comes before any profile: headers are read, the request may be refused, endpoints are left out for all stages.

In: a request and candidates. Out: what failed; of screeners, the candidates that are left and what was left out, too.
Rules here: processors run first, then admitters, then screeners, each kind in its order; one that fails has no part in
the request and is named; a Refusal is no failure.
Source: llm-d router, request control (order of its plugins).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from epp.dialects.request import Request
from epp.endpoints.table import Candidates, all_true
from epp.errors import Refusal
from epp.scheduling.decision import Exclusion, Failure
from epp.scheduling.plugin import Admitter, Instance, Processor, Screener
from epp.scheduling.profile import checked


def prepare(
    processors: Sequence[Processor], admitters: Sequence[Admitter], request: Request, candidates: Candidates
) -> tuple[Failure, ...]:
    """Let headers be read, and the request be refused. Raises Refusal."""
    failures: list[Failure] = []
    calls: list[tuple[Instance, Callable[[], None]]] = [
        *((each, lambda each=each: each.process(request)) for each in processors),
        *((each, lambda each=each: each.admit(request, candidates)) for each in admitters),
    ]
    for each, call in calls:
        try:
            call()
        except Refusal:
            raise
        except Exception as error:
            failures.append(Failure.of(each.name, error))
    return tuple(failures)


def screened(
    screeners: Sequence[Screener], request: Request, candidates: Candidates, exclusions: Sequence[Exclusion]
) -> tuple[Candidates, Sequence[Exclusion], Sequence[Failure]]:
    """What screeners leave, and what they leave out; each sees all, and one that fails leaves all. Raises Refusal."""
    left = np.ones(len(candidates), np.bool_)
    out, failures = [*exclusions], list[Failure]()
    for each in screeners:
        try:
            mask = checked(each.screen(request, candidates), candidates)
        except Refusal:
            raise
        except Exception as error:
            failures.append(Failure.of(each.name, error))
            continue
        if not all_true(mask | ~left):
            out.append(Exclusion(each.name, candidates.slots[left & ~mask]))
            left &= mask
    return candidates if left.all() else candidates.keep(left), out, failures
