"""Which saturation detector a configuration asks for, in every place where it may say so."""

from __future__ import annotations

import pytest

from epp.config.document import ConfigErrors
from epp.config.load import load
from epp.scheduling.detectors import ConcurrencyDetector, UtilizationDetector
from tests.config.test_load import DEFAULT, HEAD, entries

DETECTORS = """
plugins:
- {type: utilization-detector, name: strict, parameters: {queueDepthThreshold: 2, kvCacheUtilThreshold: 0.5}}
- {type: concurrency-detector, parameters: {concurrencyMode: hybrid, maxConcurrency: 8}}
- {type: queue-scorer}
"""


def test_nothing_said_is_the_utilization_detector_with_the_references_thresholds() -> None:
    assert load("").detector == load(HEAD).detector == load(HEAD + "flowControl: {saturationDetector: {}}").detector
    assert load("").detector == UtilizationDetector(
        queue_depth_threshold=5, kv_cache_util_threshold=0.8, metrics_staleness_threshold="200ms", headroom=0.0
    )


@pytest.mark.parametrize(
    "reference", ["flowControl: {saturationDetector: {pluginRef: %s}}", "saturationDetector: {pluginRef: %s}"]
)
def test_the_detector_is_the_one_that_is_referred_to(reference: str) -> None:
    strict = load(HEAD + DETECTORS + reference % "strict")
    assert strict.detector == UtilizationDetector(queue_depth_threshold=2, kv_cache_util_threshold=0.5)
    counting = load(HEAD + DETECTORS + reference % "concurrency-detector")
    assert counting.detector == ConcurrencyDetector(concurrency_mode="hybrid", max_concurrency=8)
    assert load(HEAD + reference % "utilization-detector").detector == UtilizationDetector()
    deprecated = "saturationDetector is deprecated: write flowControl.saturationDetector.pluginRef"
    assert (deprecated in counting.warnings) == reference.startswith("saturationDetector")
    assert "plugins[0]: strict has no effect: flowControl.saturationDetector does not refer to it" in counting.warnings
    assert entries(counting) == [("queue-scorer", 1.0), ("max-score-picker", 1.0)]


def test_a_declared_detector_with_the_name_of_the_default_one_is_the_default_one() -> None:
    config = load(HEAD + "plugins: [{type: utilization-detector, parameters: {queueDepthThreshold: 9}}]")
    assert config.detector == UtilizationDetector(queue_depth_threshold=9)
    assert config.warnings == ()
    assert entries(config) == DEFAULT


def test_thresholds_in_the_old_section_itself_are_read() -> None:
    text = "saturationDetector: {queueDepthThreshold: 999999999, kvCacheUtilThreshold: 0.999}"
    config = load(HEAD + text)
    assert config.detector == UtilizationDetector(queue_depth_threshold=999_999_999, kv_cache_util_threshold=0.999)
    assert config.warnings == ("saturationDetector is deprecated: write flowControl.saturationDetector.pluginRef",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{type: utilization-detector, parameters: {queueDepthThreshold: 0}}", "`int` >= 1"),
        ("{type: utilization-detector, parameters: {queueDepthThreshold: 1.5}}", "`int`, got `float`"),
        ("{type: utilization-detector, parameters: {kvCacheUtilThreshold: 0}}", "`float` > 0"),
        ("{type: utilization-detector, parameters: {kvCacheUtilThreshold: 1.01}}", "`float` <= 1"),
        ("{type: utilization-detector, parameters: {headroom: -0.1}}", "`float` >= 0"),
        ("{type: utilization-detector, parameters: {metricsStalenessThreshold: 0s}}", "longer than 0"),
        ("{type: utilization-detector, parameters: {metricsStalenessThreshold: soon}}", "'soon' is not a duration"),
        ("{type: utilization-detector, parameters: {queueDepth: 5}}", "did you mean queueDepthThreshold?"),
        ("{type: concurrency-detector, parameters: {concurrencyMode: bytes}}", "invalid enum value 'bytes'"),
        ("{type: concurrency-detector, parameters: {maxConcurrency: 0}}", "`int` >= 1"),
        ("{type: concurrency-detector, parameters: {maxTokenConcurrency: 0}}", "`int` >= 1"),
    ],
)
def test_a_threshold_that_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load(HEAD + f"plugins: [{text}]")
    (error,) = caught.value.errors
    assert message.casefold() in error.message.casefold()


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("flowControl: {saturationDetector: {pluginRef: gone}}", "flowControl.saturationDetector.pluginRef", "gone"),
        ("flowControl: {saturationDetector: {pluginRef: queue-scorer}}", "saturationDetector.pluginRef", "is a scorer"),
        ("flowControl: {saturationDetector: {queueDepthThreshold: 5}}", "queueDepthThreshold", "unknown field"),
        ("flowControl: {saturationdetector: {}}", "flowControl.saturationdetector", "did you mean saturationDetector"),
        ("saturationDetector: {pluginRef: strict, queueDepthThreshold: 5}", "queueDepthThreshold", "a parameter of"),
        ("saturationDetector: {queueDepthThreshold: 0}", "saturationDetector.queueDepthThreshold", ">= 1"),
        ("saturationDetector: {queueDepth: 5, kvCacheUtilThreshold: 0.5}", "saturationDetector.queueDepth", "unknown"),
        ("saturationDetector: 5", "saturationDetector", "expected fields"),
    ],
)
def test_a_detector_that_cannot_be_found_is_one_error_with_its_place(text: str, path: str, message: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load(HEAD + DETECTORS + text)
    (error,) = caught.value.errors
    assert error.path.endswith(path)
    assert message in error.message


def test_of_the_old_section_and_the_new_one_the_new_one_counts() -> None:
    both = "flowControl: {saturationDetector: {pluginRef: strict}}\nsaturationDetector: {kvCacheUtilThreshold: 0.1}"
    config = load(HEAD + DETECTORS + both)
    assert config.detector == UtilizationDetector(queue_depth_threshold=2, kv_cache_util_threshold=0.5)
    assert "saturationDetector has no effect: flowControl.saturationDetector is given too" in config.warnings


@pytest.mark.parametrize(
    ("parameters", "warning"),
    [
        (
            "type: utilization-detector, parameters: {headroom: 0.2}",
            "headroom has no effect: no profile uses the detector as a filter",
        ),
        (
            "type: concurrency-detector, name: utilization-detector,"
            " parameters: {inFlightLoadProducerName: inflight-load-producer}",
            "inFlightLoadProducerName has no effect: the picker counts",
        ),
    ],
)
def test_what_a_detector_does_not_read_is_told(parameters: str, warning: str) -> None:
    (told,) = load(HEAD + f"plugins: [{{{parameters}}}]").warnings
    assert told.startswith(f"plugins[0]: utilization-detector: {warning}")
