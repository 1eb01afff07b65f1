"""From what the operator asked for to what decides."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

from epp.config.document import ConfigErrors
from epp.config.schema import Config, Declared, UtilizationDetector
from epp.config.units import parse_duration
from epp.errors import ConfigError
from epp.flow.saturation import Concurrency, Counted, Detector, Utilization
from epp.scheduling.plugin import SIGNALS, Context, Filter, Instance, Picker, Producer, Scorer
from epp.scheduling.profile import Profile
from epp.scheduling.scheduler import Scheduler


def build(config: Config, rng: Random, signals: Collection[str] = SIGNALS) -> Scheduler:
    """Make the scheduler that a configuration describes.

    Args:
        rng: what equals are spread by.
        signals: what is provided to plugins.

    Raises:
        ConfigErrors: a plugin needs a signal that nobody provides, or cannot be made as it is configured.
    """
    errors: list[ConfigError] = []
    made: dict[str, Instance] = {}

    def make(declared: Declared, context: Context) -> None:
        assert declared.plugin is not None
        missing = [need for need in declared.plugin.needs if need not in signals]
        if missing:
            errors.append(declared.place.error(f"{declared.name} needs {', '.join(missing)}, which nobody provides"))
            return
        try:
            made[declared.name] = declared.plugin.make(declared.name, declared.params, context)
        except ConfigError as error:
            errors.append(declared.place.error(error.message))

    (profile,) = config.profiles
    for declared in config.plugins.values():
        if declared.plugin is not None and declared.plugin.kind is Producer:
            make(declared, Context())
    producers = {name: instance for name, instance in made.items() if isinstance(instance, Producer)}
    for reference in profile.plugins:
        make(config.plugins[reference.name], Context(producers))
    if errors:
        raise ConfigErrors(errors)
    instances = [(made[reference.name], reference.weight) for reference in profile.plugins]
    filters = [instance for instance, _ in instances if isinstance(instance, Filter)]
    scorers = [(instance, weight) for instance, weight in instances if isinstance(instance, Scorer)]
    (picker,) = [instance for instance, _ in instances if isinstance(instance, Picker)]
    return Scheduler(Profile(profile.name, filters, scorers, picker), list(producers.values()), rng)


def detector(config: Config) -> Detector:
    """What says whether the pool is saturated: for `PickerOptions.detector`."""
    params = config.detector
    if isinstance(params, UtilizationDetector):
        staleness = parse_duration(params.metrics_staleness_threshold)
        return Utilization(params.queue_depth_threshold, params.kv_cache_util_threshold, staleness)
    return Concurrency(Counted(params.concurrency_mode), params.max_concurrency, params.max_token_concurrency)
