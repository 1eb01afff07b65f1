"""Scheduling profiles, and the handler that chooses among them.

Rules here: a profile has one picker, and no plugin twice; what has no effect in a profile is told and left out; a
profile that names no picker gets the one declared, else max-score-picker.
Source: llm-d router, config loader and defaults.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from yaml import MappingNode

from epp.config.declarations import IN_PROFILES, Declarations
from epp.config.document import At, Document, Given, Place
from epp.config.known import KNOWN
from epp.config.references import own_kinds
from epp.config.schema import Declared, DetectorParams, ProfileConfig, ProfileEntry, Reference

DEFAULT_SCORERS: Final = (("queue-scorer", 2.0), ("kv-cache-utilization-scorer", 2.0), ("prefix-cache-scorer", 3.0))
DEFAULT_PICKER: Final = "max-score-picker"
SINGLE: Final = "single-profile-handler"


class Profiles:
    """The section schedulingProfiles while it is read."""

    def __init__(self, document: Document, plugins: Declarations, places: dict[str, Place]) -> None:
        self.document = document
        self.plugins = plugins
        self.places = places
        """Gets where profiles and their entries are written."""

    def read(self, at: At | None) -> tuple[ProfileConfig, ...]:
        items = self.document.items(at)
        if not items:
            return (self._default_profile(),)
        profiles: dict[str, ProfileConfig] = {}
        for item in items:
            profile = self._profile(item)
            if profile.name in profiles:
                self.document.complain(item, f"two profiles are named {profile.name}: give one another name")
            profiles[profile.name] = profile
            self.places[f"schedulingProfiles.{profile.name}"] = self.document.place(item)
        return tuple(profiles.values())

    def _profile(self, item: At) -> ProfileConfig:
        fields = self.document.fields(item, ("name", "plugins")) or {}
        name = self.document.text(fields["name"]) if "name" in fields else None
        if "name" not in fields and isinstance(item.node, MappingNode):
            self.document.complain(item, "a profile needs a name")
        references: dict[str, Reference] = {}
        stand_ins: list[Reference] = []
        for at in self.document.items(fields.get("plugins")):
            entry = self.document.params(at, ProfileEntry, at)
            declared = self.plugins.by_name.get(entry.value.plugin_ref) if entry else None
            if entry is None or declared is None:
                continue
            stand_ins += self._standing_in(declared, entry.value.weight)
            if (reference := self._reference(entry, declared, at)) is not None:
                self._check(reference.name, references, at)
                references[reference.name] = reference
                key = f"schedulingProfiles.{name}.{reference.name}"
                self.places[key] = self.document.place(at)
                self.places |= {f"{key}.weight": place for path, place in entry.places.items() if path == "weight"}
        _add(references, stand_ins)
        if not self._pickers(references):
            declared_ones = self._pickers(self.plugins.by_name)
            picker = declared_ones[0] if len(declared_ones) == 1 else self._default_picker()
            references[picker] = Reference(picker)
        # A name that was reported must not make two profiles one.
        return ProfileConfig(name or item.path, tuple(references.values()))

    def _check(self, name: str, references: Mapping[str, Reference], at: At) -> None:
        if name in references:
            message = f"{name} is listed twice: one entry with the sum of the weights says the same"
            self.document.complain(at, message)
        elif self.plugins.acts_as(name, "picker") and (others := self._pickers(references)):
            self.document.complain(at, f"a profile has one picker: keep {name} or {others[0]}")

    def _default_picker(self) -> str:
        return self.plugins.default(DEFAULT_PICKER, "a profile needs a picker")

    def _pickers(self, names: Collection[str]) -> list[str]:
        return [name for name in names if self.plugins.acts_as(name, "picker")]

    def _reference(self, entry: Given[ProfileEntry], declared: Declared, at: At) -> Reference | None:
        """An entry of a profile; None: it has no effect there."""
        name, weight = declared.name, entry.value.weight
        if IN_PROFILES.isdisjoint(self.plugins.kinds(name)):
            why = "it is no filter, scorer or picker"
            self.plugins.warnings.append(f"{at.path}: {name} has no effect in a profile: {why}")
        if not self.plugins.acts_as(name, *IN_PROFILES):
            return None
        scores = self.plugins.acts_as(name, "scorer")
        if "weight" in entry.places and not scores:
            self.plugins.warnings.append(f"{at.path}.weight has no effect: {name} is no scorer")
        return Reference(name, weight if scores else 1.0)

    def _standing_in(self, declared: Declared, weight: float) -> list[Reference]:
        """Who scores in place of a plugin that is not ours; empty: nobody."""
        shares = KNOWN[declared.type].stands_in if declared.plugin is None else ()
        if shares:
            types = " and ".join(type_ for type_, _ in shares)
            score = "score" if len(shares) > 1 else "scores"
            self.plugins.warnings.append(f"{declared.place.path}: {types} {score} in place of {declared.name}")
        why = f"in place of {declared.name}"
        return [Reference(self.plugins.default(type_, why), weight * share) for type_, share in shares]

    def _default_profile(self) -> ProfileConfig:
        """All that is declared, in the order of the file; the default scorers where there is nothing to go by."""
        references: dict[str, Reference] = {}
        for name, declared in list(self.plugins.by_name.items()):
            _add(references, self._standing_in(declared, 1.0))
            if self.plugins.acts_as(name, "filter", "scorer") and not isinstance(declared.params, DetectorParams):
                _add(references, [Reference(name)])
        if not references and not self.plugins.broken:
            why = "no filter or scorer is declared"
            _add(references, [Reference(self.plugins.default(name, why), weight) for name, weight in DEFAULT_SCORERS])
        pickers = self._pickers(self.plugins.by_name) or [self._default_picker()]
        for name in pickers[1:]:
            message = f"{pickers[0]} picks already: keep one picker, or write schedulingProfiles"
            self.document.errors.append(self.plugins.by_name[name].place.error(message))
        return ProfileConfig("default", (*references.values(), Reference(pickers[0])))

    def handler(self, profiles: Sequence[ProfileConfig]) -> str:
        """Name of the plugin that chooses among the profiles; empty: there is one, and nothing to choose."""
        handlers = [name for name in self.plugins.by_name if "handler" in self.plugins.kinds(name)]
        names = ", ".join(profile.name for profile in profiles)
        for name in handlers[1:]:
            message = f"{handlers[0]} chooses among profiles already: keep one of the two"
            self.document.errors.append(self.plugins.by_name[name].place.error(message))
        if not handlers and len(profiles) > 1 and not self.plugins.broken:
            catalogue = self.plugins.catalogue.items()
            types = ", ".join(type_ for type_, plugin in catalogue if "handler" in own_kinds(plugin))
            place = self.places[f"schedulingProfiles.{profiles[1].name}"]
            message = f"{names} need a plugin that chooses among them: declare one of {types}"
            self.document.errors.append(place.error(message))
        if not handlers or self.plugins.by_name[handlers[0]].type != SINGLE:
            return handlers[0] if handlers else ""
        if len(profiles) > 1:
            place = self.plugins.by_name[handlers[0]].place
            self.document.errors.append(place.error(f"{SINGLE} runs one profile, and there are {names}"))
        return ""


def _add(references: dict[str, Reference], more: Iterable[Reference]) -> None:
    """Weights of the same plugin add up."""
    for each in more:
        before = references.get(each.name)
        references[each.name] = Reference(each.name, each.weight + before.weight) if before else each
