"""What a configuration has become, and what it becomes when it changes.

In: a configuration, then others. Out: the scheduler and the detector of the latest one that could be used.
Rules here: a configuration is taken as a whole or not at all; a plugin that it describes as the last one did is kept,
with all that it has learned; signals are those of the first one, since what fetches them is built once.
"""

from __future__ import annotations

from random import Random

from epp.config.build import assemble, detector, make_plugins
from epp.config.schema import Config
from epp.scheduling.plugin import SIGNALS


class Running:
    """The plugins that decide now."""

    def __init__(self, config: Config, rng: Random) -> None:
        """
        Args:
            rng: what equals are spread by.

        Raises:
            ConfigErrors: the configuration cannot be used.
        """
        self._rng = rng
        self._signals = SIGNALS.union(config.pages.attributes)
        self._plugins = make_plugins(config, rng, self._signals)
        self.scheduler = assemble(config, self._plugins, rng)
        self.detector = detector(config)

    def take(self, config: Config) -> None:
        """Decide by another configuration from now on.

        Raises:
            ConfigErrors: it cannot be used; then the last one stays.
        """
        plugins = make_plugins(config, self._rng, self._signals, self._plugins)
        scheduler = assemble(config, plugins, self._rng)
        self._plugins, self.scheduler, self.detector = plugins, scheduler, detector(config)
