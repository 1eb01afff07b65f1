"""Every plugin there is: one line each, and what installed packages add.

A package adds plugins by an entry point in the group `epp.plugins` that names a `Plugin`, as in its pyproject.toml:

    [project.entry-points."epp.plugins"]
    rack-scorer = "my_package:rack"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from epp.errors import ConfigError
from epp.scheduling import pickers, producers, scorers
from epp.scheduling.plugin import Instance, Plugin

Catalogue = Mapping[str, Plugin[Instance]]
"""Plugin by type."""

GROUP: Final = "epp.plugins"

BUILT_IN: Final[tuple[Plugin[Instance], ...]] = (
    scorers.queue,
    scorers.running,
    scorers.kv_cache,
    scorers.active_request,
    scorers.lora_affinity,
    scorers.prefix_cache,
    pickers.max_score,
    pickers.at_random,
    pickers.weighted_random,
    producers.approximate_prefix,
)


def catalogue(added: Iterable[Plugin[Instance]] = ()) -> Catalogue:
    """The built-in plugins and those added.

    Raises:
        ConfigError: two plugins have the same type.
    """
    by_type: dict[str, Plugin[Instance]] = {}
    for plugin in (*BUILT_IN, *added):
        if plugin.name in by_type:
            raise ConfigError(f"two plugins have the type {plugin.name}: uninstall one of the packages that add it")
        by_type[plugin.name] = plugin
    return by_type


def installed() -> list[Plugin[Instance]]:
    """Plugins of installed packages. Looks them up each time: called once, by who starts the picker.

    Raises:
        ConfigError: an entry point cannot be loaded, or is no plugin; says which, and of which package.
    """
    return [_loaded(entry) for entry in entry_points(group=GROUP)]


def _loaded(entry: EntryPoint) -> Plugin[Instance]:
    package = entry.dist.name if entry.dist else "an installed package"
    try:
        plugin = entry.load()
    except Exception as error:
        raise ConfigError(f"plugin {entry.name} of {package} cannot be loaded ({entry.value}): {error}") from error
    if not isinstance(plugin, Plugin):
        raise ConfigError(f"plugin {entry.name} of {package} is no plugin ({entry.value}): decorate it with @scorer")
    return plugin
