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
from epp.scheduling import (
    admitters,
    affinity,
    cost,
    deciders,
    detectors,
    filters,
    handlers,
    labels,
    load,
    media,
    peers,
    pickers,
    processors,
    producers,
    reporters,
    responses,
    rollout,
    scorers,
    sessions,
    testing,
)
from epp.scheduling.plugin import Instance, Plugin

Catalogue = Mapping[str, Plugin[Instance]]
"""Plugin by type."""

GROUP: Final = "epp.plugins"

BUILT_IN: Final[tuple[Plugin[Instance], ...]] = (
    rollout.rollout,
    labels.label_selector,
    labels.by_label_selector,
    labels.by_label,
    labels.decode_role,
    labels.prefill_role,
    labels.encode_role,
    filters.utilization,
    filters.endpoint_attribute,
    filters.prefix_affinity,
    detectors.utilization,
    detectors.concurrency,
    sessions.affinity_filter,
    responses.response_affinity,
    affinity.topology_filter,
    scorers.queue,
    scorers.running,
    scorers.kv_cache,
    scorers.active_request,
    load.load_aware,
    load.token_load,
    load.no_hit_lru,
    load.endpoint_attribute,
    cost.cost,
    scorers.lora_affinity,
    scorers.prefix_cache,
    media.media,
    sessions.affinity_scorer,
    affinity.header_label,
    affinity.topology_scorer,
    filters.context_length,
    pickers.max_score,
    pickers.at_random,
    pickers.weighted_random,
    pickers.softmax,
    pickers.power_of_two,
    producers.approximate_prefix,
    handlers.disaggregated,
    handlers.prefill_decode,
    handlers.data_parallel,
    handlers.header_profile,
    deciders.always,
    deciders.prefix_based,
    deciders.multimodal,
    admitters.probabilistic,
    processors.agent_identity,
    sessions.session_id,
    peers.peer_source,
    reporters.request_attribute,
    testing.header_based,
    testing.served_verifier,
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
