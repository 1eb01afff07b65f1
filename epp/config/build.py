"""From what the operator asked for to what decides.

In: a checked configuration. Out: the plugins that it describes, and the scheduler that calls them.
Rules here:
- Every plugin is made once, however many profiles use it; what it refers to is made before it.
- A plugin that a new configuration describes as the old one did may be kept, with all that it has learned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from random import Random

import msgspec

from epp.config.document import ConfigErrors
from epp.config.parameters import InflightLoad
from epp.config.schema import Config, Declared, ProfileConfig
from epp.errors import ConfigError
from epp.flow.saturation import Concurrency, Counted, Detector, Utilization
from epp.scheduling.detectors import UtilizationDetector
from epp.scheduling.lineup import Lineup
from epp.scheduling.output import OutputEstimate
from epp.scheduling.peers import Hook
from epp.scheduling.plugin import (
    SIGNALS,
    Admitter,
    Context,
    Decider,
    Filter,
    Handler,
    Instance,
    Params,
    Picker,
    Plugin,
    Processor,
    Producer,
    Scorer,
    Screener,
)
from epp.scheduling.profile import Profile
from epp.scheduling.reporters import Reporter
from epp.scheduling.scheduler import Scheduler
from epp.units import parse_duration

FIRST = (Producer, Decider)
"""Kinds that others are made with, in this order."""


class Made(msgspec.Struct, frozen=True, eq=False):
    """A plugin of a configuration, made."""

    plugin: Plugin[Instance]
    params: Params
    roles: tuple[Instance, ...]
    """One instance for each role of its type."""
    settings: Mapping[str, Params]
    """What other plugins' parameters it may have been made with."""


Plugins = Mapping[str, Made]
"""By name in the configuration."""


def build(config: Config, rng: Random, signals: Collection[str] | None = None) -> Scheduler:
    """Make the scheduler that a configuration describes.

    Args:
        rng: what equals are spread by.
        signals: what is provided to plugins; None: the table's columns, and what the configuration has read of pages.

    Raises:
        ConfigErrors: a plugin needs a signal that nobody provides, or cannot be made as it is configured.
    """
    return assemble(config, make_plugins(config, rng, signals), rng)


def make_plugins(
    config: Config, rng: Random, signals: Collection[str] | None = None, before: Plugins | None = None
) -> Plugins:
    """Make the plugins that a configuration describes.

    Args:
        before: those of the configuration that this one replaces. One that has the same name, type and parameters now
            is kept as it is; where producers or other settings are not the same, only producers are kept, for others
            may have been made with them.

    Raises:
        ConfigErrors: as `build`.
    """
    errors: list[ConfigError] = []
    made: dict[str, Made] = {}
    producers: dict[str, Producer] = {}
    deciders: dict[str, Decider] = {}
    signals = SIGNALS.union(config.pages.attributes) if signals is None else signals
    settings = {name: declared.params for name, declared in config.plugins.items() if declared.plugin is None}
    profiles = tuple(profile.name for profile in config.profiles)
    context = Context(producers, deciders, rng, profiles, signals, settings)
    kept = _kept(config, settings, before or {})
    for declared, plugin in _in_order(config):
        try:
            each = kept.get(declared.name) or Made(plugin, declared.params, _roles(declared, plugin, context), settings)
        except ConfigError as error:
            errors.append(declared.place.error(error.message))
            continue
        made[declared.name] = each
        for role in each.roles:
            if isinstance(role, Producer):
                producers[declared.name] = role
            elif isinstance(role, Decider):
                deciders[declared.name] = role
    if errors:
        raise ConfigErrors(errors)
    return made


def _kept(config: Config, settings: Mapping[str, Params], before: Plugins) -> Plugins:
    """Those of before that a configuration describes as they were; no handler, which knows what profiles there are."""
    same = {
        name: each
        for name, each in before.items()
        if (now := config.plugins.get(name)) is not None
        and now.plugin is each.plugin
        and now.params == each.params
        and each.plugin.kind is not Handler
    }
    producers = {name: each for name, each in same.items() if each.plugin.kind is Producer}
    wanted = {name for name, now in config.plugins.items() if now.plugin is not None and now.plugin.kind is Producer}
    had = {name for name, each in before.items() if each.plugin.kind is Producer}
    alike = all(each.settings == settings for each in before.values())
    return same if alike and wanted == had == producers.keys() else producers


def assemble(config: Config, made: Plugins, rng: Random) -> Scheduler:
    """The scheduler of a configuration and the plugins that it describes."""
    instances = [instance for each in made.values() for instance in each.roles]
    handlers = made[config.handler].roles if config.handler in made else ()
    return Scheduler(
        Lineup(
            [_profile(profile, made) for profile in config.profiles],
            [instance for instance in instances if isinstance(instance, Producer)],
            handler=next((each for each in handlers if isinstance(each, Handler)), None),
            processors=[instance for instance in instances if isinstance(instance, Processor)],
            admitters=[instance for instance in instances if isinstance(instance, Admitter)],
            screeners=[instance for instance in instances if isinstance(instance, Screener)],
            others=[instance for instance in instances if isinstance(instance, Decider | Hook | Reporter)],
            output=_output(config),
        ),
        rng,
    )


def _output(config: Config) -> OutputEstimate | None:
    """How long answers are taken to be, where an inflight-load-producer is to count that."""
    for declared in config.plugins.values():
        params = declared.params
        if isinstance(params, InflightLoad) and params.add_estimated_output_tokens:
            return OutputEstimate(params.output_ratio, params.max_estimated_output_tokens)
    return None


def _in_order(config: Config) -> Sequence[tuple[Declared, Plugin[Instance]]]:
    """The plugins that are the catalogue's: those that others are made with first, else in their order."""
    ours = [(declared, declared.plugin) for declared in config.plugins.values() if declared.plugin is not None]
    return sorted(ours, key=lambda each: FIRST.index(each[1].kind) if each[1].kind in FIRST else len(FIRST))


def _roles(declared: Declared, plugin: Plugin[Instance], context: Context) -> tuple[Instance, ...]:
    """Raises ConfigError: one of them needs what nobody provides, or cannot be made so."""
    needs = dict.fromkeys(need for role in plugin.roles for need in role.needs)
    missing = [need for need in needs if need not in context.signals]
    if missing:
        raise ConfigError(f"{declared.name} needs {', '.join(missing)}, which nobody provides")
    return tuple(role.make(declared.name, declared.params, context) for role in plugin.roles)


def _profile(profile: ProfileConfig, made: Plugins) -> Profile:
    instances = [(each, entry.weight) for entry in profile.plugins for each in made[entry.name].roles]
    filters = [instance for instance, _ in instances if isinstance(instance, Filter)]
    scorers = [(instance, weight) for instance, weight in instances if isinstance(instance, Scorer)]
    (picker,) = [instance for instance, _ in instances if isinstance(instance, Picker)]
    return Profile(profile.name, filters, scorers, picker)


def detector(config: Config) -> Detector:
    """What says whether the pool is saturated: for `PickerOptions.detector`."""
    params = config.detector
    if isinstance(params, UtilizationDetector):
        staleness = parse_duration(params.metrics_staleness_threshold)
        return Utilization(params.queue_depth_threshold, params.kv_cache_util_threshold, staleness)
    return Concurrency(Counted(params.concurrency_mode), params.max_concurrency, params.max_token_concurrency)
