"""A JSON Schema of the configuration, from the types that it is read by, for editors and other people's checks.

In: a catalogue. Out: one schema, draft 2020-12, that depends on nothing else.
Rules here: whatever `load` accepts of a file that leaves nothing blank, the schema accepts; names that refer to others
and ranges that hang on each other are beyond a schema, so what it accepts may still be refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, get_args, get_origin

import msgspec

from epp.config.describe import described, field_docs
from epp.config.document import unwrapped
from epp.config.known import KNOWN
from epp.config.load import FALSE, TRUE
from epp.config.schema import (
    API_VERSION,
    FEATURE_GATES,
    KIND,
    LEGACY_API_VERSION,
    DataLayer,
    DetectorSection,
    FlowControl,
    ParserEntry,
    ProfileSection,
    RequestHandler,
)
from epp.scheduling.catalogue import Catalogue
from epp.scheduling.detectors import UtilizationDetector
from epp.scheduling.plugin import NoParams, Params

Schema = dict[str, Any]
"""JSON. `Any`: what it holds is the schema's own affair."""
DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"
DEFINITION: Final = "#/$defs/{name}"
SECTIONS: Final = (ProfileSection, DataLayer, FlowControl, RequestHandler, DetectorSection, ParserEntry)


def json_schema(plugins: Catalogue) -> Schema:
    """The schema of every configuration that the plugins of a catalogue can be asked for."""
    types: dict[str, type[Params]] = {
        type_: (plugins.get(type_) or KNOWN[type_]).params for type_ in dict.fromkeys((*plugins, *KNOWN))
    }
    kinds: list[type[msgspec.Struct]] = [*SECTIONS, UtilizationDetector, *types.values()]
    structs = dict.fromkeys(each for kind in kinds for each in _all(kind))
    refs, definitions = msgspec.json.schema_components(structs, ref_template=DEFINITION)
    ref = dict(zip(structs, refs, strict=True))
    for kind, pointer in ref.items():
        _document(definitions[pointer["$ref"].rpartition("/")[2]], kind)
    return {
        "$schema": DRAFT,
        "title": KIND,
        "description": "What an endpoint picker is to do.",
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind"],
        "properties": {
            "apiVersion": {"enum": [API_VERSION, LEGACY_API_VERSION]},
            "kind": {"const": KIND},
            "featureGates": {"type": "array", "items": {"enum": list(_gates())}},
            "plugins": {"type": "array", "items": _plugin(types, plugins, ref)},
            "schedulingProfiles": {"type": "array", "items": ref[ProfileSection]},
            "dataLayer": ref[DataLayer],
            "flowControl": ref[FlowControl],
            "requestHandler": ref[RequestHandler],
            "data": _old(ref[DataLayer], "dataLayer"),
            "parser": _old(ref[ParserEntry], "requestHandler.parsers"),
            "saturationDetector": _old(
                {"anyOf": [ref[DetectorSection], ref[UtilizationDetector]]},
                "flowControl.saturationDetector.pluginRef",
            ),
        },
        "$defs": definitions,
    }


def _plugin(types: dict[str, type[Params]], plugins: Catalogue, ref: dict[Any, Schema]) -> Schema:
    """One entry of `plugins`: what its parameters may be follows from its type."""
    rules: list[Schema] = []
    for type_, params in types.items():
        about = described(type_, plugins)
        then: Schema = {"properties": {"parameters": ref[params] if params is not NoParams else {"maxProperties": 0}}}
        if any(field.required for field in msgspec.structs.fields(params)):
            then["required"] = ["parameters"]
        then["description"] = about.doc
        if about.instead:
            then["deprecated"] = True
        rules.append({"if": {"properties": {"type": {"const": type_}}, "required": ["type"]}, "then": then})
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["type"],
        "properties": {
            "name": {"type": "string", "minLength": 1, "description": "What others refer to it by; else its type."},
            "type": {"enum": list(types)},
            "parameters": {"type": "object"},
        },
        "allOf": rules,
    }


def _gates() -> Iterator[str]:
    for gate in FEATURE_GATES:
        yield gate
        yield from (f"{gate}={value}" for value in (*TRUE, *FALSE))


def _old(schema: Schema, instead: str) -> Schema:
    return {**schema, "deprecated": True, "description": f"Deprecated: write {instead}."}


def _all(kind: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """A struct and those within it."""
    yield kind
    for field in msgspec.structs.fields(kind):
        plain, _ = unwrapped(field.type)
        if get_origin(plain) is tuple:
            plain, _ = unwrapped(get_args(plain)[0])
        if isinstance(plain, type) and issubclass(plain, msgspec.Struct):
            yield from _all(plain)


def _document(definition: Schema, kind: type[msgspec.Struct]) -> None:
    """Put the docstrings under a struct's fields where an editor shows them."""
    docs = field_docs(kind)
    for field in msgspec.structs.fields(kind):
        if field.name in docs:
            definition["properties"][field.encode_name].setdefault("description", docs[field.name])
