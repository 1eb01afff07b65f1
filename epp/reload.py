"""The configuration file while the picker runs: a change is checked, told, and taken between two requests.

In: a file, and whoever can use what it says. Out: another configuration in use, or a line that says why not.
Rules here:
- A file that cannot be used changes nothing: it is refused, counted and told, and the one that runs goes on.
- It is read in a thread, for it may lie on a slow disk; it is taken on the event loop, in one step.
- What cannot change while the picker runs is named, whenever a new configuration asks for it; everything else counts.
Rejected: taking only what has changed, setting by setting, which leaves the picker between two configurations.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from epp.config.changes import changes
from epp.config.schema import Config
from epp.errors import ConfigError
from epp.watch import FileWatch

logger = logging.getLogger("epp.reload")

LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks; a change is taken when two of them have seen the same."""
MOST_LINES: Final = 100
"""Differences that are told of one change."""
AT_START: Final[tuple[tuple[str, Callable[[Config], object]], ...]] = (
    ("dataLayer.discovery", lambda config: config.discovery),
    ("the data sources and extractors", lambda config: config.pages),
)
"""What is built once: its name, and what a configuration says of it."""


class Reload:
    """Follows the configuration file."""

    def __init__(
        self, file: str, watch: FileWatch, config: Config, read: Callable[[], Config], take: Callable[[Config], None]
    ) -> None:
        """
        Args:
            watch: of the file, made before it was read for the first time, so that no change is missed between.
            config: what it said then.
            read: reads it; called in a thread. Raises ConfigError: it cannot be used.
            take: has the picker use what was read. Raises ConfigError: it cannot, and nothing has changed.
        """
        self._file = file
        self._watch = watch
        self._started = self._config = config
        self._read = read
        self._take = take
        self.taken = 0
        """Times that a changed file was taken."""
        self.refused = 0
        """Times that one was not."""

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL)
            await self.look()

    async def look(self) -> None:
        """Take the file if it has changed."""
        if not self._watch.has_changed():
            return
        try:
            config = await asyncio.to_thread(self._read)
            self._take(config)
        except ConfigError as error:
            self.refused += 1
            logger.error("%s changed and cannot be used, the last one stays: %s", self._file, error)
            return
        self.taken += 1
        self._tell(config)
        self._config = config

    def _tell(self, config: Config) -> None:
        told = changes(self._config, config)
        logger.info("%s changed: %d differences", self._file, len(told))
        for change in told[:MOST_LINES]:
            logger.info("%s: %s", self._file, change)
        for warning in config.warnings:
            logger.warning(warning)
        for name, of in AT_START:
            if of(config) != of(self._started):
                logger.warning("%s: %s takes effect at the next start", self._file, name)
