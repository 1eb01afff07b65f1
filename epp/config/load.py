"""EndpointPickerConfig, read: text in, `Config` out, or every mistake of the file.

Rules here:
- Strict: an unknown field, type or reference is an error with file, line, column, path and what was meant.
- What is accepted and has no effect is a warning; nothing is ignored in silence.
- Defaults are the reference's. Where it leaves a choice to chance (the order of filters, the one of several pickers),
  the order of the file counts, or it is an error.
- A file that declares no filter and no scorer gets the default ones: routing blindly is never what was meant.
Source: llm-d router, config loader and defaults.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Final

from msgspec import Meta

from epp.config.document import At, ConfigErrors, Document, did_you_mean
from epp.config.schema import (
    API_VERSION,
    FEATURE_GATES,
    KIND,
    LEGACY_API_VERSION,
    OTHER_TYPES,
    Config,
    Declared,
    DetectorParams,
    FileDiscovery,
    Parser,
    ProfileConfig,
    Reference,
    UtilizationDetector,
)
from epp.errors import ConfigError
from epp.scheduling.catalogue import Catalogue, catalogue
from epp.scheduling.plugin import DEFAULT_PRODUCER, PREFIX_MATCH, Filter, Instance, Picker, Producer, Scorer

DEFAULT_SCORERS: Final = (("queue-scorer", 2.0), ("kv-cache-utilization-scorer", 2.0), ("prefix-cache-scorer", 3.0))
DEFAULT_PICKER: Final = "max-score-picker"
DEFAULT_DETECTOR: Final = "utilization-detector"
DETECTORS: Final = "type utilization-detector or concurrency-detector"
IN_LINE: Final = ("queueDepthThreshold", "kvCacheUtilThreshold", "metricsStalenessThreshold")
"""Fields of `saturationDetector` before it referred to a plugin."""

SECTIONS: Final = (
    "apiVersion",
    "kind",
    "featureGates",
    "plugins",
    "schedulingProfiles",
    "dataLayer",
    "flowControl",
    "saturationDetector",
)
NOT_YET: Final = ("requestHandler", "parser")
"""Sections that are accepted and not read."""
NOT_YET_IN_FLOW_CONTROL: Final = (
    "maxBytes",
    "maxRequests",
    "defaultRequestTTL",
    "noEndpointRequestTTL",
    "defaultPriorityBand",
    "defaultNegativePriorityBand",
    "priorityBands",
    "usageLimitPolicyPluginRef",
    "enableEviction",
)
NOT_YET_IN_DATA_LAYER: Final = ("peerDiscovery", "crossReplicaSyncerPluginRef", "crossReplicaSyncInterval")

Weight = Annotated[float, Meta(ge=0, le=sys.float_info.max)]


def load_file(path: str | Path, plugins: Catalogue | None = None) -> Config:
    """As `load`, from a file.

    Raises:
        ConfigError: it cannot be read; or as `load`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=str(path)) from error
    return load(text, str(path), plugins)


def load(text: str, file: str = "", plugins: Catalogue | None = None) -> Config:
    """Read a configuration. An empty text is the default one.

    Args:
        file: its name, for errors.
        plugins: those that there are; None: the built-in ones.

    Raises:
        ConfigErrors: everything that is wrong with it.
    """
    document = Document(text, file)
    reading = _Reading(document, catalogue() if plugins is None else plugins)
    config = reading.config()
    if document.errors:
        raise ConfigErrors(document.errors)
    return config


class _Reading:
    """One document while it becomes a `Config`. Every method reads one part of it, and reports what is wrong there."""

    def __init__(self, document: Document, plugins: Catalogue) -> None:
        self.document = document
        self.plugins = plugins
        self.declared: dict[str, Declared] = {}
        self.broken: set[str] = set()
        """Names of plugins that were reported: who refers to them is not to blame."""
        self.warnings: list[str] = []

    def config(self) -> Config:
        top = self._top()
        self._gates(top.get("featureGates"))
        for item in self.document.items(top.get("plugins")):
            self._plugin(item)
        profiles = self._profiles(top.get("schedulingProfiles"))
        discovery = self._data_layer(top.get("dataLayer"))
        used = {reference.name for profile in profiles for reference in profile.plugins}
        used |= {self._producer(self.declared[name]) for name in used if self._needs_prefix(name)}
        detector = self._saturation(top.get("flowControl"), top.get("saturationDetector"))
        self._unused(used, discovery, detector)
        plugins = {name: each for name, each in self.declared.items() if each.plugin is None or name in used}
        return Config(plugins, profiles, discovery, detector, tuple(self.warnings))

    def _top(self) -> dict[str, At]:
        root = self.document.root
        if root is None:
            return {}
        top = self.document.fields(root, (*SECTIONS, *NOT_YET))
        if top is None:
            return {}
        for name, expected in (("apiVersion", (API_VERSION, LEGACY_API_VERSION)), ("kind", (KIND,))):
            if name not in top:
                self.document.complain(root, f"{name} is missing: write {name}: {expected[0]}")
            elif (said := self.document.text(top[name])) not in expected and said is not None:
                self.document.complain(top[name], f"{name} {said} is not known: write {expected[0]}")
            elif said == LEGACY_API_VERSION:
                self.warnings.append(f"apiVersion {said} is deprecated: write {API_VERSION}")
        self.warnings += [f"{name} has no effect yet: it is not read" for name in NOT_YET if name in top]
        return top

    def _gates(self, at: At | None) -> None:
        for item in self.document.items(at):
            gate, _, value = (self.document.text(item) or "").partition("=")
            if gate and gate not in FEATURE_GATES:
                hint = did_you_mean(gate, FEATURE_GATES)
                self.document.complain(item, f"feature gate {gate} is not known{hint}")
            elif value not in ("", "true", "false"):
                self.document.complain(item, f"expected {gate}=true or {gate}=false, not {value!r}")
            elif gate:
                self.warnings.append(f"{item.path}: the feature gate {gate} has no effect yet")

    def _plugin(self, item: At) -> None:
        fields = self.document.fields(item, ("name", "type", "parameters"))
        if fields is None:
            return
        if "type" not in fields:
            self.document.complain(item, "a plugin needs a type")
            return
        type_ = self.document.text(fields["type"])
        name = self.document.text(fields["name"]) if "name" in fields else type_
        if type_ is None or name is None:
            return
        plugin = self.plugins.get(type_)
        kind = plugin.params if plugin else OTHER_TYPES.get(type_)
        if kind is None:
            self.broken.add(name)
            hint = did_you_mean(type_, (*self.plugins, *OTHER_TYPES))
            self.document.complain(fields["type"], f"plugin type {type_} is not known{hint}")
            return
        params, given = self.document.params(fields.get("parameters"), kind, item)
        if params is None:
            self.broken.add(name)
        elif name in self.declared:
            self.document.complain(fields.get("name", item), f"two plugins are named {name}: give one another name")
        else:
            idle = params.idle(given)
            self.warnings += [f"{item.path}: {name}: {key} has no effect: {why}" for key, why in idle.items()]
            self.declared[name] = Declared(name, type_, params, plugin, self.document.place(item))

    # -- profiles ------------------------------------------------------------------------------------------------

    def _profiles(self, at: At | None) -> tuple[ProfileConfig, ...]:
        items = self.document.items(at)
        if not items:
            return (self._default_profile(),)
        for item in items[1:]:
            self.document.complain(item, "one profile is possible: no handler that chooses between several exists yet")
        return tuple(self._profile(item) for item in items)

    def _profile(self, item: At) -> ProfileConfig:
        fields = self.document.fields(item, ("name", "plugins"))
        if fields is None:
            return ProfileConfig("", ())
        name = self.document.text(fields["name"]) if "name" in fields else None
        if "name" not in fields:
            self.document.complain(item, "a profile needs a name")
        entries = [self._reference(entry) for entry in self.document.items(fields.get("plugins"))]
        references = [reference for reference in entries if reference is not None]
        counts = Counter(reference.name for reference in references)
        for twice in (name for name, count in counts.items() if count > 1):
            self.document.complain(
                item, f"{twice} is listed twice: one entry with the sum of the weights says the same"
            )
        pickers = [reference.name for reference in references if self._is_a(reference.name, Picker)]
        if len(pickers) > 1:
            self.document.complain(item, f"a profile has one picker: keep one of {', '.join(pickers)}")
        if not pickers:
            declared = [name for name in self.declared if self._is_a(name, Picker)]
            references.append(Reference(declared[0] if len(declared) == 1 else self._default(DEFAULT_PICKER)))
        return ProfileConfig(name or "", tuple(references))

    def _default_profile(self) -> ProfileConfig:
        """All that is declared, in the order of the file; the default scorers where there is nothing to go by."""
        references = [Reference(name) for name in self.declared if self._is_a(name, Filter, Scorer)]
        if not references and not self.broken:
            references = [Reference(self._default(name), weight) for name, weight in DEFAULT_SCORERS]
        pickers = [name for name in self.declared if self._is_a(name, Picker)] or [self._default(DEFAULT_PICKER)]
        for name in pickers[1:]:
            message = f"{pickers[0]} picks already: keep one picker, or write schedulingProfiles"
            self.document.errors.append(self.declared[name].place.error(message))
        return ProfileConfig("default", (*references, Reference(pickers[0])))

    def _reference(self, entry: At) -> Reference | None:
        fields = self.document.fields(entry, ("pluginRef", "weight"))
        name = self._resolved(entry, fields)
        if fields is None or name is None:
            return None
        if not self._is_a(name, Filter, Scorer, Picker):
            self.warnings.append(f"{entry.path}: {name} has no effect in a profile: it is no filter, scorer or picker")
            return None
        if "weight" not in fields:
            return Reference(name)
        if not self._is_a(name, Scorer):
            self.warnings.append(f"{entry.path}.weight has no effect: {name} is no scorer")
            return Reference(name)
        weight: float | None = self.document.value(fields["weight"], Weight)
        return Reference(name) if weight is None else Reference(name, weight)

    def _producer(self, reader: Declared) -> str:
        """The name of the producer that a plugin reads prefix matches from; declared here if it is the default one."""
        name: str = getattr(reader.params, "prefix_match_info_producer_name", "") or DEFAULT_PRODUCER
        if name not in self.declared and name == DEFAULT_PRODUCER:
            self._default(name)
        elif name not in self.broken and not self._is_a(name, Producer):
            there = ", ".join(name for name in self.declared if self._is_a(name, Producer)) or "none"
            message = f"prefixMatchInfoProducerName: no producer is named {name} (there are: {there})"
            self.document.errors.append(reader.place.error(message))
        return name

    # -- data layer ----------------------------------------------------------------------------------------------

    def _data_layer(self, at: At | None) -> FileDiscovery | None:
        if at is None:
            return None
        known = ("injectDefaults", "sources", "discovery", *NOT_YET_IN_DATA_LAYER)
        fields = self.document.fields(at, known) or {}
        if "injectDefaults" in fields and self.document.value(fields["injectDefaults"], bool) is False:
            self.warnings.append(f"{at.path}.injectDefaults has no effect: metrics pages are always read")
        self.warnings += [f"{at.path}.{name} has no effect yet" for name in NOT_YET_IN_DATA_LAYER if name in fields]
        for source in self.document.items(fields.get("sources")):
            inner = self.document.fields(source, ("pluginRef", "extractors"))
            self._resolved(source, inner)
            for extractor in self.document.items((inner or {}).get("extractors")):
                self._resolved(extractor, self.document.fields(extractor, ("pluginRef",)))
        return self._discovery(fields["discovery"]) if "discovery" in fields else None

    def _discovery(self, at: At) -> FileDiscovery | None:
        name = self._resolved(at, self.document.fields(at, ("pluginRef",)))
        if name is None:
            return None
        params = self.declared[name].params
        if isinstance(params, FileDiscovery):
            return params
        self.document.complain(at, f"{name} discovers no endpoints: refer to a plugin of type file-discovery")
        return None

    # -- saturation ----------------------------------------------------------------------------------------------

    def _saturation(self, flow: At | None, old: At | None) -> DetectorParams:
        """The detector that flowControl.saturationDetector names, or the older section of its own, or the default."""
        at = self._flow_control(flow)
        if old is not None:
            self.warnings.append(f"{old.path} is deprecated: write flowControl.saturationDetector.pluginRef")
            if at is None:
                return self._old_detector(old)
            self.document.complain(old, "flowControl.saturationDetector is given too: keep that one")
        return self._detector(at, self.document.fields(at, ("pluginRef",)) if at else {})

    def _flow_control(self, at: At | None) -> At | None:
        known = ("saturationDetector", *NOT_YET_IN_FLOW_CONTROL)
        fields = (self.document.fields(at, known) if at else None) or {}
        self.warnings += [f"flowControl.{name} has no effect yet" for name in NOT_YET_IN_FLOW_CONTROL if name in fields]
        return fields.get("saturationDetector")

    def _old_detector(self, at: At) -> DetectorParams:
        """It referred to a plugin, or held the thresholds itself."""
        before = len(self.document.errors)
        fields = self.document.fields(at, ("pluginRef", *IN_LINE))
        if len(self.document.errors) > before or fields is None:
            return UtilizationDetector()
        if fields and "pluginRef" not in fields:
            return self.document.params(at, UtilizationDetector, at)[0] or UtilizationDetector()
        for name in fields.keys() - {"pluginRef"}:
            self.document.complain(fields[name], "this is a parameter of the plugin that pluginRef names")
        return self._detector(at, fields)

    def _detector(self, at: At | None, fields: dict[str, At] | None) -> DetectorParams:
        """The parameters of the plugin that `pluginRef` names; the default one need not be declared."""
        name = self._resolved(at, fields, DEFAULT_DETECTOR) if at and fields else DEFAULT_DETECTOR
        declared = self.declared.get(name or "")
        if declared is None:
            return UtilizationDetector()
        if isinstance(declared.params, DetectorParams):
            return declared.params
        place = self.document.place(at) if at and fields else declared.place
        self.document.errors.append(place.error(f"{name} is no saturation detector: refer to one of {DETECTORS}"))
        return UtilizationDetector()

    # -- names ---------------------------------------------------------------------------------------------------

    def _resolved(self, owner: At, fields: dict[str, At] | None, given: str = "") -> str | None:
        """The plugin that `pluginRef` names; None: reported. No fields: they were reported.

        Args:
            given: a name that need not be declared.
        """
        if fields is None:
            return None
        if "pluginRef" not in fields:
            self.document.complain(owner, "pluginRef is missing: name a plugin")
            return None
        at = fields["pluginRef"]
        name = self.document.text(at)
        if name is None or name == given or name in self.declared:
            return name
        if name not in self.broken:
            self.document.complain(at, f"no plugin is named {name}{did_you_mean(name, self.declared)}: declare it")
        return None

    def _is_a(self, name: str, *kinds: type[Instance]) -> bool:
        declared = self.declared.get(name)
        return declared is not None and declared.plugin is not None and issubclass(declared.plugin.kind, kinds)

    def _needs_prefix(self, name: str) -> bool:
        plugin = self.declared[name].plugin
        return plugin is not None and PREFIX_MATCH in plugin.needs

    def _default(self, name: str) -> str:
        """Declare a plugin under its own type with its defaults, unless the file has done so."""
        plugin = self.plugins[name]
        declared = self.declared.setdefault(name, Declared(name, name, plugin.params(), plugin))
        if declared.type != name:
            message = f"{name} is the name of a plugin that is added by default: give this {declared.type} another"
            self.document.errors.append(declared.place.error(message))
        return name

    def _unused(self, used: Collection[str], discovery: FileDiscovery | None, detector: DetectorParams) -> None:
        for name, declared in self.declared.items():
            if isinstance(declared.params, Parser):
                why = "every dialect is always understood, by its path"
            elif isinstance(declared.params, FileDiscovery) and declared.params is not discovery:
                why = "dataLayer.discovery does not refer to it"
            elif isinstance(declared.params, DetectorParams) and declared.params is not detector:
                why = "flowControl.saturationDetector does not refer to it"
            elif declared.plugin is not None and name not in used:
                why = "no profile uses it"
            else:
                continue
            self.warnings.append(f"{declared.place.path}: {name} has no effect: {why}")
