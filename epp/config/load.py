"""EndpointPickerConfig, read: text in, `Config` out, or every mistake of the file.

Rules here:
- Strict: an unknown field, type or reference is an error with file, line, column, path and what was meant.
- What is accepted and has no effect is a warning; nothing is ignored in silence.
- Defaults are the reference's. Where it leaves a choice to chance (the order of filters, the one of several pickers),
  the order of the file counts, or it is an error.
- A file that declares no filter and no scorer gets the default ones: routing blindly is never what was meant.
- Whatever works on whole requests (admitters, processors) works because it is declared, as in the reference.
Source: llm-d router, config loader and defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeVar

import msgspec

from epp.config.declarations import Declarations
from epp.config.document import At, ConfigErrors, Document, Given, Place, did_you_mean
from epp.config.known import KNOWN, PARSER_WHY
from epp.config.pages import pages
from epp.config.parameters import FileDiscovery, changed
from epp.config.profiles import Profiles
from epp.config.schema import (
    API_VERSION,
    DEFAULT_DETECTOR,
    FEATURE_GATES,
    KIND,
    LEGACY_API_VERSION,
    Config,
    DataLayer,
    DetectorParams,
    DetectorSection,
    FlowControl,
    ParserEntry,
    RequestHandler,
)
from epp.errors import ConfigError
from epp.scheduling.catalogue import Catalogue, catalogue
from epp.scheduling.detectors import UtilizationDetector
from epp.scheduling.plugin import Params

SECTIONS: Final = (
    "apiVersion",
    "kind",
    "featureGates",
    "plugins",
    "schedulingProfiles",
    "dataLayer",
    "flowControl",
    "requestHandler",
)
DEPRECATED_SECTIONS: Final = {
    "data": "dataLayer",
    "parser": "requestHandler.parsers",
    "saturationDetector": "flowControl.saturationDetector.pluginRef",
}
"""Sections of the years before, and what to write now."""
TRUE: Final = ("", "true", "True", "TRUE", "t", "T", "1")
FALSE: Final = ("false", "False", "FALSE", "f", "F", "0")
"""As Go's strconv.ParseBool."""

S = TypeVar("S", bound=Params)


def load_file(path: str | Path, plugins: Catalogue | None = None, *, experimental: bool = False) -> Config:
    """As `load`, from a file.

    Raises:
        ConfigError: it cannot be read; or as `load`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=str(path)) from error
    return load(text, str(path), plugins, experimental=experimental)


def load(text: str, file: str = "", plugins: Catalogue | None = None, *, experimental: bool = False) -> Config:
    """Read a configuration. An empty text is the default one.

    Args:
        file: its name, for errors.
        plugins: those that there are; None: the built-in ones.
        experimental: plugins that may change are allowed.

    Raises:
        ConfigErrors: everything that is wrong with it.
    """
    document = Document(text, file)
    config = _Reading(document, catalogue() if plugins is None else plugins, experimental).config()
    if document.errors:
        raise ConfigErrors(document.errors)
    return config


class _Reading:
    """One document while it becomes a `Config`. Every method reads one part of it, and reports what is wrong there."""

    def __init__(self, document: Document, plugins: Catalogue, experimental: bool) -> None:
        self.document = document
        self.plugins = Declarations(document, plugins, experimental)
        self.places: dict[str, Place] = {}

    def config(self) -> Config:
        top = self._top()
        gates = self._gates(top.get("featureGates"))
        for item in self.document.items(top.get("plugins")):
            self.plugins.read(item)
        section = Profiles(self.document, self.plugins, self.places)
        profiles = section.read(top.get("schedulingProfiles"))
        handler = section.handler(profiles)
        data = self._section(top.get("dataLayer") or top.get("data"), DataLayer, "dataLayer")
        flow = self._section(top.get("flowControl"), FlowControl, "flowControl")
        handling = self._section(top.get("requestHandler"), RequestHandler, "requestHandler")
        flow = self._old_detector(flow, top.get("saturationDetector"))
        handling = self._old_parser(handling, top.get("parser"))
        detector = self._detector(flow.value)
        discovery = self._discovery(data.value)
        self._sources(data)
        self._bands(flow)
        self.plugins.resolve([profile.name for profile in profiles])
        used = self.plugins.used([each.name for profile in profiles for each in profile.plugins], handler)
        self._no_effect(flow, data, handling)
        self.plugins.tell_unused(used, discovery, detector)
        plugins = [self.plugins.by_name[name] for name in self.plugins.in_order()]
        return Config(
            {each.name: each for each in plugins if self.plugins.counts(each, used, detector)},
            profiles,
            handler,
            gates,
            flow.value,
            data.value,
            handling.value,
            discovery,
            detector,
            tuple(self.plugins.warnings),
            self.places,
        )

    def _top(self) -> dict[str, At]:
        root = self.document.root
        if root is None:
            return {}
        top = self.document.fields(root, (*SECTIONS, *DEPRECATED_SECTIONS))
        if top is None:
            return {}
        for name, expected in (("apiVersion", (API_VERSION, LEGACY_API_VERSION)), ("kind", (KIND,))):
            if name not in top:
                self.document.complain(root, f"{name} is missing: write {name}: {expected[0]}")
            elif (said := self.document.text(top[name])) not in expected and said is not None:
                self.document.complain(top[name], f"{name} {said} is not known: write {expected[0]}")
            elif said == LEGACY_API_VERSION:
                self.plugins.warnings.append(f"apiVersion {said} is deprecated: write {API_VERSION}")
        self.plugins.warnings += [
            f"{old} is deprecated: write {new}" for old, new in DEPRECATED_SECTIONS.items() if old in top
        ]
        return top

    def _gates(self, at: At | None) -> dict[str, bool]:
        gates: dict[str, bool] = {}
        for item in self.document.items(at):
            gate, _, value = (self.document.text(item) or "").partition("=")
            if gate and gate not in FEATURE_GATES:
                hint = did_you_mean(gate, FEATURE_GATES)
                self.document.complain(item, f"feature gate {gate} is not known{hint}")
            elif value not in (*TRUE, *FALSE):
                self.document.complain(item, f"expected {gate}=true or {gate}=false, not {value!r}")
            elif gate:
                gates[gate] = value in TRUE
                self.places[f"featureGates.{gate}"] = self.document.place(item)
                self.plugins.warnings.append(f"{item.path}: the feature gate {gate} has no effect yet")
        return gates

    # -- sections ------------------------------------------------------------------------------------------------

    def _section(self, at: At | None, kind: type[S], name: str) -> Given[S]:
        """Its defaults where it is not written, or something was reported."""
        given = self.document.params(at, kind, at) if at is not None else None
        if given is None:
            return Given(kind(), {})
        self.places |= {f"{name}.{path}": place for path, place in given.places.items()}
        return given

    def _old_parser(self, handling: Given[RequestHandler], old: At | None) -> Given[RequestHandler]:
        entry = self.document.params(old, ParserEntry, old) if old is not None else None
        if entry is None or handling.value.parsers:
            return handling
        return Given(RequestHandler(parsers=(entry.value,)), {})

    def _old_detector(self, flow: Given[FlowControl], old: At | None) -> Given[FlowControl]:
        """What the older section says, as if it stood in flowControl: a plugin's name, or the thresholds themselves."""
        if old is None:
            return flow
        if "saturationDetector" in flow.places:
            self.plugins.warnings.append(f"{old.path} has no effect: flowControl.saturationDetector is given too")
            return flow
        before = len(self.document.errors)
        known = {field.encode_name for field in msgspec.structs.fields(UtilizationDetector)}
        fields = self.document.fields(old, {*known, "pluginRef"}) or {}
        if "pluginRef" in fields:
            for inner in [each for key, each in fields.items() if key in known]:
                self.document.complain(inner, "this is a parameter of the plugin that pluginRef names")
        if len(self.document.errors) > before:
            return flow
        if fields.keys() & known:
            self.plugins.declare(DEFAULT_DETECTOR, self.document.params(old, UtilizationDetector, old), old)
            return flow
        section = self.document.params(old, DetectorSection, old)
        if section is None:
            return flow
        value = msgspec.structs.replace(flow.value, saturation_detector=section.value)
        return Given(value, flow.places)

    def _detector(self, flow: FlowControl) -> DetectorParams:
        name = flow.saturation_detector.plugin_ref
        if name == DEFAULT_DETECTOR and name not in self.plugins.by_name:
            self.plugins.default(name, "flowControl.saturationDetector refers to it")
        declared = self.plugins.by_name.get(name)
        return declared.params if declared and isinstance(declared.params, DetectorParams) else UtilizationDetector()

    def _discovery(self, data: DataLayer) -> FileDiscovery | None:
        declared = self.plugins.by_name.get(data.discovery.plugin_ref) if data.discovery else None
        if declared is None or not isinstance(declared.params, FileDiscovery) or KNOWN[declared.type].why:
            return None
        return declared.params

    def _sources(self, data: Given[DataLayer]) -> None:
        """Every extractor must understand what its source fetches."""
        for i, source in enumerate(data.value.sources):
            fetched = self.plugins.by_name.get(source.plugin_ref)
            for j, each in enumerate(source.extractors):
                reader = self.plugins.by_name.get(each.plugin_ref)
                reads = KNOWN[reader.type].reads if reader and reader.type in KNOWN else ()
                if fetched is not None and reads and fetched.type not in reads:
                    place = data.places[f"sources[{i}].extractors[{j}].pluginRef"]
                    message = f"{each.plugin_ref} does not read what {fetched.type} fetches, but {' or '.join(reads)}"
                    self.document.errors.append(place.error(message))
        found = pages({name: each.params for name, each in self.plugins.by_name.items()}, data.value.fetched)
        self.plugins.warnings += [
            f"{each.place.path}: {each.name} has no effect: {why}"
            for each in self.plugins.by_name.values()
            if (why := found.why_idle(each.name, each.type))
        ]

    def _bands(self, flow: Given[FlowControl]) -> None:
        seen: set[int] = set()
        for index, band in enumerate(flow.value.priority_bands):
            if band.priority in seen:
                place = flow.places[f"priorityBands[{index}].priority"]
                self.document.errors.append(place.error(f"two bands have the priority {band.priority}: keep one"))
            seen.add(band.priority)

    def _no_effect(self, flow: Given[FlowControl], data: Given[DataLayer], handling: Given[RequestHandler]) -> None:
        given = [name for name in changed(flow.value, flow.places) if name != "saturationDetector"]
        self.plugins.warnings += [f"flowControl.{name} has no effect yet" for name in given]
        if not data.value.inject_defaults:
            self.plugins.warnings.append("dataLayer.injectDefaults has no effect: metrics pages are always read")
        idle = ("peerDiscovery", "crossReplicaSyncerPluginRef", "crossReplicaSyncInterval")
        there = [name for name in changed(data.value, data.places) if name in idle]
        self.plugins.warnings += [f"dataLayer.{name} has no effect yet" for name in there]
        if handling.value.parsers:
            self.plugins.warnings.append(f"requestHandler.parsers has no effect: {PARSER_WHY}")
