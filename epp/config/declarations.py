"""The plugins of one document: what it declares, what is added, what refers to what, and what does nothing.

Rules here:
- A name that was reported is not reported again by who refers to it.
- A plugin that others mean when they name none is declared here, and knows for whom.
- What finds nothing here because it is not ours (`known.py`) is replaced, where its reader can read the default one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import msgspec

from epp.config.document import At, Document, Given, Named, did_you_mean
from epp.config.known import KNOWN
from epp.config.parameters import FileDiscovery, changed
from epp.config.references import Mention, in_order, kinds, mentions, own_kinds
from epp.config.schema import Declared, DetectorParams
from epp.scheduling.catalogue import Catalogue
from epp.scheduling.plugin import DEFAULT_PRODUCER, PREFIX_MATCH, Params, ProfileRef, Ref

IN_PROFILES: Final = frozenset(("filter", "scorer", "picker"))
REFERRED_TO: Final = IN_PROFILES | {"producer", "decider", "handler"}
"""Kinds that do something only where something else names them; all others work because they are declared."""


class Declarations:
    """Every plugin that a document knows of, by name."""

    def __init__(self, document: Document, catalogue: Catalogue, experimental: bool) -> None:
        self.document = document
        self.catalogue = catalogue
        self.experimental = experimental
        self.by_name: dict[str, Declared] = {}
        self.broken: set[str] = set()
        """Names of plugins that were reported: who refers to them is not to blame."""
        self.warnings: list[str] = []

    def read(self, item: At) -> None:
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
        plugin, known = self.catalogue.get(type_), KNOWN.get(type_)
        about = plugin or known
        if about is None:
            self.broken.add(name)
            hint = did_you_mean(type_, (*self.catalogue, *KNOWN))
            self.document.complain(fields["type"], f"plugin type {type_} is not known{hint}")
            return
        if about.experimental and not self.experimental:
            self.document.complain(fields["type"], f"{type_} is experimental: it needs --allow-experimental-plugins")
        if about.instead:
            self.warnings.append(f"{item.path}.type: {type_} is deprecated: write {about.instead}")
        given = self.document.params(fields.get("parameters"), about.params, item)
        if given is None:
            self.broken.add(name)
        elif name in self.by_name:
            self.document.complain(fields.get("name", item), f"two plugins are named {name}: give one another name")
        else:
            asked = changed(given.value, given.places)
            idle = given.value.idle(asked)
            self.warnings += [f"{item.path}: {name}: {key} has no effect: {why}" for key, why in idle.items()]
            older = {key: new for key, new in about.params.instead.items() if key in asked}
            self.warnings += [f"{item.path}.parameters.{key} is deprecated: write {new}" for key, new in older.items()]
            place = self.document.place(item)
            self.by_name[name] = Declared(name, type_, given.value, plugin, place, given.places)

    def declare(self, type_: str, given: Given[Params] | None, at: At) -> None:
        """A plugin whose parameters are written elsewhere than in `plugins`; None: they were reported."""
        if given is not None:
            place = self.document.place(at)
            self.by_name[type_] = Declared(type_, type_, given.value, self.catalogue.get(type_), place, given.places)

    def default(self, name: str, why: str) -> str:
        """Declare a plugin under its own type with its defaults, unless the file has done so."""
        plugin = self.catalogue[name]
        declared = self.by_name.setdefault(name, Declared(name, name, plugin.params(), plugin, added_for=why))
        if declared.type != name:
            message = f"{name} is the name of a plugin that is added by default: give this {declared.type} another"
            self.document.errors.append(declared.place.error(message))
        return name

    def kinds(self, name: str) -> tuple[str, ...]:
        declared = self.by_name.get(name)
        return () if declared is None else kinds(declared.type, declared.plugin)

    def acts_as(self, name: str, *wanted: str) -> bool:
        """Whether a plugin of ours has one of these kinds."""
        declared = self.by_name.get(name)
        return declared is not None and declared.plugin is not None and not set(wanted).isdisjoint(self.kinds(name))

    # -- names ----------------------------------------------------------------------------------------------------

    def resolve(self, profiles: Collection[str]) -> None:
        """See that whatever is named exists, and is what it must be."""
        for named in self.document.named:
            if isinstance(named.to, ProfileRef):
                if named.name not in profiles:
                    hint = did_you_mean(named.name, profiles) or f" (there are: {', '.join(profiles)})"
                    self._complain(named, f"no profile is named {named.name}{hint}")
            elif named.name not in self.by_name:
                self._missing(named, named.to)
            elif named.to.kind not in ("plugin", *self.kinds(named.name)):
                is_ = " and ".join(map(_with_article, self.kinds(named.name)))
                there = [name for name in self.by_name if named.to.kind in self.kinds(name)] or self._types(named.to)
                refer = f"refer to {', '.join(there)}" if there else "there is none yet"
                self._complain(named, f"{named.name} is {is_}, and {_with_article(named.to.kind)} is needed: {refer}")

    def _missing(self, named: Named, to: Ref) -> None:
        given = named.name == to.default or (to.kind == "parser" and named.name in self._types(to))
        if not given and named.name not in self.broken:
            message = f"no plugin is named {named.name}{did_you_mean(named.name, self.by_name)}: declare it"
            self._complain(named, message)

    def _types(self, to: Ref) -> list[str]:
        """Types of plugins that could be meant."""
        both = {**dict.fromkeys(KNOWN), **self.catalogue}
        return [type_ for type_, plugin in both.items() if to.kind in kinds(type_, plugin)]

    def _complain(self, named: Named, message: str) -> None:
        self.document.errors.append(named.place.error(message))

    def used(self, roots: Collection[str], handler: str) -> dict[str, None]:
        """What does something: the roots, whatever works unasked, and those that they refer to. Declares defaults."""
        unasked = [name for name in self.by_name if self._acts_unasked(name)]
        used: dict[str, None] = {}
        open_ = [*roots, *([handler] if handler else []), *unasked]
        for name in open_:
            if name not in used and name in self.by_name:
                used[name] = None
                open_ += self._needed(name)
        return used

    def _acts_unasked(self, name: str) -> bool:
        declared = self.by_name[name]
        return declared.plugin is not None and not set(own_kinds(declared.plugin)) <= REFERRED_TO

    def _needed(self, reader: str) -> list[str]:
        """Names of the plugins that one refers to; the default ones that it means are declared."""
        declared = self.by_name[reader]
        needed, read = [], False
        for mention in mentions(declared.params):
            if isinstance(mention.to, Ref):
                read |= mention.to.kind == "producer" and mention.to.default == DEFAULT_PRODUCER
                needed.append(self._meant(reader, mention, mention.to))
        if not read and declared.plugin is not None and PREFIX_MATCH in declared.plugin.needs:
            needed.append(self.default(DEFAULT_PRODUCER, f"{reader} reads it"))
        return [name for name in needed if name]

    def _meant(self, reader: str, mention: Mention, to: Ref) -> str:
        name = mention.name or to.default
        declared = self.by_name.get(name)
        if declared is None and name == to.default and name in self.catalogue:
            return self.default(name, f"{reader} reads it")
        if (
            declared is not None
            and declared.plugin is None
            and to.default == DEFAULT_PRODUCER
            and self.by_name[reader].plugin
        ):
            return self._instead(reader, mention, declared)
        return name

    def _instead(self, reader: str, mention: Mention, known: Declared) -> str:
        """Let a plugin read the default producer, since the one that it names finds nothing here."""
        declared = self.by_name[reader]
        for field in msgspec.structs.fields(declared.params):
            if field.encode_name == mention.path:
                params = msgspec.structs.replace(declared.params, **{field.name: DEFAULT_PRODUCER})
                self.by_name[reader] = msgspec.structs.replace(declared, params=params)
                why = f"{reader} reads {DEFAULT_PRODUCER} instead of {known.name}"
                self.warnings.append(f"{declared.place.path}.parameters.{mention.path} has no effect: {why}")
                return self.default(DEFAULT_PRODUCER, f"{reader} reads it")
        return ""

    def in_order(self) -> list[str]:
        needs = {
            name: [each.name or each.to.default for each in mentions(declared.params) if isinstance(each.to, Ref)]
            for name, declared in self.by_name.items()
        }

        def circle(names: Collection[str]) -> None:
            first, second, *_ = names
            declared = self.by_name[first]
            paths = [each.path for each in mentions(declared.params) if each.name == second]
            place = declared.places.get(paths[0], declared.place) if paths else declared.place
            self.document.errors.append(
                place.error(f"{' -> '.join(names)}: plugins that refer to each other in a circle")
            )

        return [name for name in in_order(list(self.by_name), needs, circle) if name in self.by_name]

    def counts(self, declared: Declared, used: Collection[str], detector: DetectorParams) -> bool:
        return declared.plugin is None or declared.name in used or declared.params is detector

    def tell_unused(self, used: Collection[str], discovery: FileDiscovery | None, detector: DetectorParams) -> None:
        for name, declared in self.by_name.items():
            acts = name in used and declared.plugin is not None
            why = "" if acts else self._why_idle(declared, discovery, detector)
            if why:
                self.warnings.append(f"{declared.place.path}: {name} has no effect: {why}")
            elif name not in used and isinstance(declared.params, DetectorParams) and declared.params.headroom:
                why = "no profile uses the detector as a filter"
                self.warnings.append(f"{declared.place.path}: {name}: headroom has no effect: {why}")

    def _why_idle(self, declared: Declared, discovery: FileDiscovery | None, detector: DetectorParams) -> str:
        """Of a plugin that nobody uses."""
        if isinstance(declared.params, DetectorParams):
            referred = declared.params is detector
            return "" if referred else "flowControl.saturationDetector does not refer to it"
        if declared.plugin is None:
            known = KNOWN[declared.type]
            idle = isinstance(declared.params, FileDiscovery) and declared.params is not discovery
            return known.why or ("dataLayer.discovery does not refer to it" if idle else "")
        return "no plugin refers to it" if "decider" in self.kinds(declared.name) else "no profile uses it"


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeo' else 'a'} {kind}"
