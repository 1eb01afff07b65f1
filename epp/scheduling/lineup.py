"""The plugins that decide, each in its part. Made from a configuration, once; the scheduler calls them."""

from __future__ import annotations

from collections.abc import Sequence

from epp.scheduling.output import OutputEstimate
from epp.scheduling.peers import Hook
from epp.scheduling.plugin import (
    PREFIX_MATCH,
    Admitter,
    Chosen,
    Filter,
    Handler,
    Instance,
    Processor,
    Producer,
    Scorer,
    Screener,
)
from epp.scheduling.profile import Profile
from epp.scheduling.quarantine import CALLS, Quarantine
from epp.scheduling.reporters import Reporter

Told = tuple[tuple[str, Chosen], ...]
"""Who is told of a decision, by name."""


class Lineup:
    """Who takes part."""

    def __init__(
        self,
        profiles: Sequence[Profile],
        producers: Sequence[Producer] = (),
        *,
        handler: Handler | None = None,
        processors: Sequence[Processor] = (),
        admitters: Sequence[Admitter] = (),
        screeners: Sequence[Screener] = (),
        others: Sequence[Instance] = (),
        output: OutputEstimate | None = None,
    ) -> None:
        """
        Args:
            profiles: at least one.
            handler: chooses among the profiles; None: there is one.
            others: plugins that those above call, or that only hooks call; their needs count too.
            output: how long answers are taken to be; None: nobody counts that.
        """
        self.profiles = {profile.name: profile for profile in profiles}
        self.first = profiles[0]
        self.producers = tuple(producers)
        self.handler = handler
        self.processors, self.admitters, self.screeners = tuple(processors), tuple(admitters), tuple(screeners)
        self.others, self.output = tuple(others), output
        every = self._every()
        self.reads_prompt = any(need in (PREFIX_MATCH, "inflight_tokens") for each in every for need in each.needs)
        self.learn: Told = _told(self.producers)
        self.told: dict[str, Told] = {profile.name: _told(profile.plugins) for profile in profiles}
        """By profile."""
        self.hooks = tuple(each for each in self.others if isinstance(each, Hook))
        self.answered = tuple((each.name, each.answered) for each in every if each.answered is not None)
        """What plugins do when a response begins, for `headers_of_answer`."""
        self.pins = tuple((each.name, each.pins) for each in every if each.pins is not None)
        """Who says that requests name their endpoints, for `pinned`."""
        self.reporters = tuple(each for each in self.others if isinstance(each, Reporter))
        """Who tells the proxy something of a whole answer, for `reported`."""
        self.stored = tuple(
            (each.name, each.stored) for each in every if isinstance(each, Filter) and each.stored is not None
        )
        """Who is told of responses that servers keep."""
        self.followed = tuple(
            (each.name, each.followed) for each in every if isinstance(each, Scorer) and each.followed is not None
        )
        """Who is told how requests go on."""
        self.forget = tuple((each.name, each.forget) for each in every if each.forget is not None)

    def watched(self, by: Quarantine) -> Lineup:
        """The same, with each plugin watched."""
        return Lineup(
            [profile.watched(by) for profile in self.profiles.values()],
            [by.watched(each) for each in self.producers],
            handler=None if self.handler is None else by.watched(self.handler),
            processors=[by.watched(each) for each in self.processors],
            admitters=[by.watched(each) for each in self.admitters],
            screeners=[by.watched(each) for each in self.screeners],
            others=[by.watched(each) if type(each) in CALLS else each for each in self.others],
            output=self.output,
        )

    def _every(self) -> Sequence[Instance]:
        """Each of them once: profiles may share plugins."""
        of_profiles = [plugin for profile in self.profiles.values() for plugin in profile.plugins]
        handlers = () if self.handler is None else (self.handler,)
        beside = (*self.producers, *self.processors, *self.admitters, *self.screeners, *self.others, *handlers)
        return tuple({id(each): each for each in (*beside, *of_profiles)}.values())


def _told(plugins: Sequence[Instance]) -> Told:
    return tuple((each.name, each.chosen) for each in plugins if each.chosen is not None)
