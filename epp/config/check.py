"""Somebody's plugins, checked before they are installed: for `epp plugins --check`.

In: a module. Out: what is wrong with the plugins in it, as text.
Rules here: what counts as a plugin is what an entry point may name, a module's public variable that is a `Plugin`; of
a package, its modules' too. Nothing is added to any catalogue.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType

from epp.config.describe import parameters
from epp.errors import ConfigError
from epp.scheduling.catalogue import BUILT_IN, catalogue
from epp.scheduling.check import Finding, check
from epp.scheduling.plugin import Instance, Plugin


def check_module(name: str, stopwatch: Callable[[], float]) -> tuple[str, bool]:
    """A line for each finding, or for a plugin without any, and whether all may be used.

    Args:
        name: as it is imported: "my_package.scorers".
        stopwatch: seconds.

    Raises:
        ConfigError: it cannot be imported, or has no plugin.
    """
    plugins = plugins_of(name)
    types = [each.name for each in plugins]
    found = [(each, [*_of_its_description(each, types), *check(each, stopwatch=stopwatch)]) for each in plugins]
    lines = [line for each, findings in found for line in _lines(each, findings)]
    return "\n".join(lines), not any(each.severity == "error" for _, findings in found for each in findings)


def plugins_of(name: str) -> list[Plugin[Instance]]:
    """The plugins of a module, or of all modules of a package, in their order.

    Built-in ones that it imports are not its own. Raises ConfigError, as `check_module`.
    """
    found: dict[int, Plugin[Instance]] = {}
    for module in _modules(name):
        imported = BUILT_IN if not module.__name__.startswith("epp.") else ()
        for word, each in vars(module).items():
            if isinstance(each, Plugin) and not word.startswith("_") and not any(each is one for one in imported):
                found[id(each)] = each
    if not found:
        raise ConfigError(f"module {name} has no plugin: decorate a function with @scorer, or what else it is")
    return list(found.values())


def _modules(name: str) -> Iterator[ModuleType]:
    module = _imported(name)
    yield module
    for below in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{name}."):
        yield _imported(below.name)


def _imported(name: str) -> ModuleType:
    if name.endswith(".py") or "/" in name:
        raise ConfigError(f"{name} is a file: name the module as it is imported, such as my_package.scorers")
    try:
        return import_module(name)
    except Exception as error:  # whatever an unknown module does when it is run
        raise ConfigError(f"module {name} cannot be imported: {type(error).__name__}: {error}") from error


def _of_its_description(plugin: Plugin[Instance], types: Sequence[str]) -> Iterator[Finding]:
    """
    Args:
        types: of all plugins that are checked with it.
    """
    if catalogue().get(plugin.name, plugin) is not plugin:
        yield Finding(plugin.name, "error", "has the type of a built-in plugin: choose another")
    if types.count(plugin.name) > 1:
        yield Finding(plugin.name, "error", "has the type of another plugin of this module: choose another")
    for each in parameters(plugin.params):
        if not each.doc:
            yield Finding(plugin.name, "error", f"has a parameter without a docstring below it: {each.name}")


def _lines(plugin: Plugin[Instance], findings: Sequence[Finding]) -> Iterator[str]:
    yield from (f"{plugin.name}: {each.severity}: {each.message}" for each in findings)
    if not findings:
        yield f"{plugin.name}: ok ({', '.join(role.kind.__name__.lower() for role in plugin.roles)})"
