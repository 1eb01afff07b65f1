"""Differences between two configurations, one line each."""

from __future__ import annotations

import pytest

from epp.config.changes import changes
from epp.config.effective import effective
from epp.config.load import load
from tests.config.test_load import HEAD

BEFORE = """
plugins:
- {type: queue-scorer, name: q}
- {type: prefix-cache-scorer}
- {type: max-score-picker}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: q, weight: 2}, {pluginRef: prefix-cache-scorer}, {pluginRef: max-score-picker}]}
"""


def told(after: str) -> list[str]:
    return changes(load(HEAD + BEFORE), load(HEAD + after))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("weight: 2", "weight: 3", ["schedulingProfiles.default.q.weight: 2 -> 3"]),
        ("weight: 2", "weight: 1", ["schedulingProfiles.default.q.weight: removed, was 2"]),
        (
            "{type: max-score-picker}",
            "{type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}",
            ["plugins.max-score-picker.maxNumOfEndpoints: 1 -> 2"],
        ),
        (
            "queue-scorer, name: q",
            "running-requests-size-scorer, name: q",
            ["plugins.q: type queue-scorer -> type running-requests-size-scorer"],
        ),
        (
            "plugins:\n",
            "flowControl: {saturationDetector: {pluginRef: full}}\nplugins:\n"
            "- {type: concurrency-detector, name: full, parameters: {maxConcurrency: 7}}\n",
            [
                "plugins.full: added, type concurrency-detector with maxConcurrency: 7",
                "plugins.utilization-detector: removed, type utilization-detector",
                'flowControl.saturationDetector.pluginRef: "utilization-detector" -> "full"',
            ],
        ),
        ("plugins:\n", "featureGates: [dataLayer]\nplugins:\n", ["featureGates.dataLayer: added, true"]),
        (
            "{pluginRef: q, weight: 2}, {pluginRef: prefix-cache-scorer}",
            "{pluginRef: prefix-cache-scorer}, {pluginRef: q, weight: 2}",
            [
                "schedulingProfiles.default: q, prefix-cache-scorer, max-score-picker"
                " -> prefix-cache-scorer, q, max-score-picker"
            ],
        ),
        ("plugins:\n", "# a comment\nplugins:\n", []),
    ],
)
def test_each_difference_is_a_line(old: str, new: str, expected: list[str]) -> None:
    assert old in BEFORE
    assert told(BEFORE.replace(old, new)) == expected


def test_spelling_a_configuration_out_changes_nothing() -> None:
    config = load(HEAD + BEFORE)
    assert changes(config, load(effective(config))) == []
