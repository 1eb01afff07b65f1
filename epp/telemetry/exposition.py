"""The metrics page: names, labels and help of every family, and how accumulators become lines.

In: `Metrics`, the endpoint table, and what else counts, read when somebody scrapes. Out: Prometheus' text format.
Rules here:
- Each family has its name here and nowhere else; the legacy twins of the reference's older dashboards are written from
  the same accumulators, added up over the labels that they lack.
- What is not known is absent: a pool gauge has no value when no endpoint is fresh, rather than its last one.
- The page comes in pieces, one a family, each made in one go, so that a histogram is consistent in itself and the
  longest stop of the event loop is one family's.
- Bounds are spelled as Go spells them (le="1", le="1.048576e+06"): rules and dashboards name them.
Rejected: prometheus_client's `generate_latest`, which takes 240 ms for the largest page (100 full sets of labels, each
with a model of its own: 40,000 lines, 7.3 MB). Filling a template per family takes 24 ms, and 1.2 ms in the largest
family. Its parser is the judge in the tests, and its process collector supplies process_*.
Left out: plugin_duration_seconds, which would need a clock inside the pure core, and request_streaming_itl_seconds,
which would need one per chunk.
Source: llm-d router, `pkg/epp/metrics`; the text format, version 0.0.4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from functools import cache
from math import isnan
from typing import Final

import msgspec
import numpy as np
from prometheus_client import ProcessCollector, generate_latest

from epp.endpoints.table import EndpointTable
from epp.telemetry.metrics import Metrics, RequestSeries
from epp.telemetry.series import OTHER, Counter, Histogram

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

CANONICAL: Final = "llm_d_epp_"
OURS: Final = "epp_"
"""What the reference does not have."""
OBJECTIVE: Final = "inference_objective_"
POOL: Final = "inference_pool_"
EXTENSION: Final = "inference_extension_"
SCHEDULER: Final = "llm_d_inference_scheduler_"

MODEL: Final = ("model_name", "target_model_name")
REQUEST: Final = (*MODEL, "fairness_id", "priority")
Values = tuple[str, ...]
PREFIX_PRODUCER: Final = "approx-prefix-cache-producer"
INFLIGHT_PRODUCER: Final = "inflight-load-producer"
SCRAPE_SOURCE: Final = "metrics-data-source"
SCRAPE_EXTRACTOR: Final = "core-metrics-extractor"

REQUEST_HISTOGRAMS: Final = (
    ("request_duration_seconds", "request_duration_seconds", "duration", "From request headers to the answer's end."),
    ("request_size_bytes", "request_sizes", "request_size", "Request bodies."),
    ("response_size_bytes", "response_sizes", "response_size", "Response bodies, where Envoy shows them."),
    ("request_input_tokens", "input_tokens", "input_tokens", "Prompt tokens, as the model server says."),
    ("request_output_tokens", "output_tokens", "output_tokens", "Output tokens, as the model server says."),
    ("request_cached_tokens", "prompt_cached_tokens", "cached_tokens", "Prompt tokens that were cached, likewise."),
    ("request_ntpot_seconds", "normalized_time_per_output_token_seconds", "ntpot", "Duration by output tokens."),
    ("request_streaming_tpot_seconds", "", "tpot", "Streamed: time after the first byte by tokens after the first."),
)
"""Canonical name, legacy name (none where empty), attribute of RequestSeries, help."""

POOL_GAUGES: Final = (
    ("kv_cache_utilization", "kv_usage", "share of the KV cache in use"),
    ("queue_size", "waiting", "requests in the model servers' queues"),
    ("running_requests", "running", "requests that run on the model servers"),
)
"""Name after average_ and std_dev_, column of the table, help."""


class Sources(msgspec.Struct, frozen=True):
    """What is read beside `Metrics` when somebody scrapes."""

    table: EndpointTable
    pool: str
    """Name of the pool."""
    now: Callable[[], float]
    """The table's clock."""
    version: str = ""
    commit: str = ""
    scrape_errors: Callable[[], tuple[int, int]] = lambda: (0, 0)
    """Pages of model servers that did not come, and that could not be read, ever."""
    streams: Callable[[], tuple[int, int]] | None = None
    """ext_proc streams, open now and ever opened; None: not told (`--enable-grpc-stream-metrics`)."""
    ejections: Callable[[], tuple[int, int]] | None = None
    """Endpoints that are ejected now, and ejections ever."""
    prefix_blocks: Callable[[], int] | None = None
    """Entries of the approximate prefix index; None: there is none."""


def render(metrics: Metrics, sources: Sources) -> Iterator[bytes]:
    """The page, in pieces of at most one family each."""
    for section in (
        _requests(metrics),
        _decisions(metrics),
        _pool(sources),
        _inflight(sources),
        _edges(metrics, sources),
    ):
        yield from section
    yield from _ours(metrics, sources)
    yield generate_latest(_PROCESS)


def family(name: str, kind: str, about: str, samples: Iterable[tuple[str, float]]) -> bytes:
    """Counters or gauges, labels as `label_text` makes them. No samples: nothing."""
    lines = [f"{name}{{{labels}}} {value}\n" if labels else f"{name} {value}\n" for labels, value in samples]
    return _headed(name, kind, about, lines)


def histograms(name: str, about: str, samples: Iterable[tuple[str, Histogram]]) -> bytes:
    """Histograms of the same bounds, labels likewise. No samples: nothing."""
    lines = []
    for labels, histogram in samples:
        counts = tuple(histogram.cumulative())
        text = _template(name, histogram.bounds) % (*counts, repr(histogram.total), counts[-1])
        lines.append(text.replace(_LABELS, labels) if labels else text.replace(_COMMA, "").replace(_BARE, ""))
    return _headed(name, "histogram", about, lines)


def label_text(names: Values, values: Values) -> str:
    """`a="x",b="y"`, escaped as the format asks."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))


# -- sections ----------------------------------------------------------------------------------------------------


def _requests(metrics: Metrics) -> Iterator[bytes]:
    sets = [(labels, label_text(REQUEST, labels), series) for labels, series in metrics.requests]
    decided = [(labels, series.requests, series.running) for labels, _, series in sets if series.requests]
    errors = [((*labels, code), count) for labels, _, series in sets for code, count in series.errors.items()]
    about = "Requests that got a decision."
    total = [(labels, count) for labels, count, _ in decided]
    yield family(f"{CANONICAL}request_total", "counter", about, _summed(REQUEST, total))
    legacy_total = [((*labels[:2], labels[3]), count) for labels, count in total]
    yield family(f"{OBJECTIVE}request_total", "counter", about, _summed((*MODEL, "priority"), legacy_total))
    about = "Requests under way."
    running = [(labels, count) for labels, _, count in decided]
    yield family(f"{CANONICAL}request_running", "gauge", about, _summed(REQUEST, running))
    legacy_running = [(labels[:1], count) for labels, count in running]
    yield family(f"{OBJECTIVE}running_requests", "gauge", about, _summed(MODEL[:1], legacy_running))
    about = "Requests refused here, or answered by a model server with a status of 400 or more."
    yield family(f"{CANONICAL}request_error_total", "counter", about, _summed((*REQUEST, "error_code"), errors))
    legacy_errors = [((*labels[:2], labels[4]), count) for labels, count in errors]
    yield family(f"{OBJECTIVE}request_error_total", "counter", about, _summed((*MODEL, "error_code"), legacy_errors))
    for name, legacy, attribute, about in REQUEST_HISTOGRAMS:
        filled = [(labels, text, histogram) for labels, text, histogram in _filled(sets, attribute)]
        yield histograms(f"{CANONICAL}{name}", about, ((text, histogram) for _, text, histogram in filled))
        if legacy:
            yield histograms(f"{OBJECTIVE}{legacy}", about, _by_model(filled))
    yield histograms(
        f"{CANONICAL}request_ttft_seconds",
        "From request headers to the first byte of the answer's body, where Envoy shows bodies.",
        (
            (f'{text},streaming="{streaming}"', histogram)
            for streaming, attribute in (("false", "ttft"), ("true", "ttft_streaming"))
            for _, text, histogram in _filled(sets, attribute)
        ),
    )


def _decisions(metrics: Metrics) -> Iterator[bytes]:
    about = "Decisions, and requests for which no endpoint was found."
    for prefix, endpoint in ((CANONICAL, "endpoint_name"), (EXTENSION, "pod_name")):
        yield histograms(f"{prefix}scheduler_e2e_duration_seconds", "Time to decide.", (("", metrics.scheduling),))
        names = ("status", "target_model_name", endpoint, "namespace", "port")
        yield family(f"{prefix}scheduler_attempts_total", "counter", about, _summed(names, _attempts(metrics)))
    about = "From request headers to the decision or the refusal."
    yield histograms(f"{CANONICAL}request_processing_duration_seconds", about, (("", metrics.request_processing),))
    about = "From response headers to the answer's end, for answers that are not streamed."
    yield histograms(f"{CANONICAL}response_processing_duration_seconds", about, (("", metrics.response_processing),))


def _attempts(metrics: Metrics) -> Iterator[tuple[Values, float]]:
    for (target, name, address), count in metrics.attempts:
        namespace, pod = (OTHER, OTHER) if name == OTHER else _split(name)
        port = address.rpartition(":")[2]
        yield ("success", target, re.sub(r"-rank-\d+$", "", pod), namespace, port), count
    for (target,), count in metrics.failed_attempts:
        yield ("failure", target, "", "", ""), count


def _pool(sources: Sources) -> Iterator[bytes]:
    """Gauges of the endpoints that discovery lists and whose page is fresh, as those pages say."""
    table, pool = sources.table, label_text(("name",), (sources.pool,))
    fresh = table.listed[table.candidates(sources.now()).fresh()]
    # As told: what was sent since, which `column` adds for scorers, would show autoscalers a queue at idle servers.
    told = {column: table.told(column, fresh) for _, column, _ in POOL_GAUGES}
    waiting = zip(map(table.endpoint, fresh.tolist()), told["waiting"].tolist(), strict=True)
    queues = [((sources.pool, _split(endpoint.name)[1]), queue) for endpoint, queue in waiting if not isnan(queue)]
    for name in (f"{CANONICAL}ready_endpoints", f"{POOL}ready_pods"):
        yield family(name, "gauge", "Endpoints with a fresh page.", ((pool, len(fresh)),))
    for what, column, about in POOL_GAUGES:
        known = told[column][~np.isnan(told[column])]
        average = ((pool, float(known.mean())),) if len(known) else ()
        deviation = ((pool, float(known.std())),) if len(known) else ()
        yield family(f"{CANONICAL}average_{what}", "gauge", f"Average: {about}.", average)
        yield family(f"{POOL}average_{what}", "gauge", f"Average: {about}.", average)
        yield family(f"{CANONICAL}std_dev_{what}", "gauge", f"Standard deviation: {about}.", deviation)
    about = "Requests in the endpoint's queue."
    labels = ("name", "model_server_endpoint")
    yield family(f"{CANONICAL}per_endpoint_queue_size", "gauge", about, _summed(labels, queues))
    labels = ("name", "model_server_pod")
    yield family(f"{POOL}per_pod_queue_size", "gauge", about, _summed(labels, queues))


def _inflight(sources: Sources) -> Iterator[bytes]:
    """Counts of every endpoint, also of those that left while requests run on them.

    The reference splits them by fairness_id and priority; here they are one series an endpoint, so sums by endpoint
    agree and the number of series does not depend on clients.
    """
    table, now = sources.table, sources.now()
    slots = np.array([slot for slot in range(table.width) if table.generation(slot)], np.int64)
    places = [_split(table.endpoint(slot).name) for slot in slots.tolist()]
    labels = [(name, namespace, INFLIGHT_PRODUCER) for namespace, name in places]
    requests: list[float] = table.column("inflight", slots, now)[0].tolist()
    tokens: list[float] = table.column("inflight_tokens", slots, now)[0].tolist()
    names = ("endpoint_name", "namespace", "producer_name")
    about = "Requests under way on each endpoint."
    yield family(f"{CANONICAL}inflight_requests", "gauge", about, _summed(names, zip(labels, requests, strict=True)))
    about = "Prompt tokens under way on each endpoint, of requests whose answer has not begun."
    yield family(f"{CANONICAL}inflight_tokens", "gauge", about, _summed(names, zip(labels, tokens, strict=True)))


def _edges(metrics: Metrics, sources: Sources) -> Iterator[bytes]:
    for prefix in (CANONICAL, EXTENSION):
        build = label_text(("commit", "build_ref"), (sources.commit, sources.version))
        yield family(f"{prefix}info", "gauge", "The build.", ((build, 1),))
    polls, extracts = sources.scrape_errors()
    source = label_text(("source_type",), (SCRAPE_SOURCE,))
    extractor = label_text(("source_type", "extractor_type"), (SCRAPE_SOURCE, SCRAPE_EXTRACTOR))
    for prefix in (CANONICAL, SCHEDULER):
        about = "Pages of model servers that did not come."
        yield family(f"{prefix}datalayer_poll_errors_total", "counter", about, ((source, polls),))
        about = "Pages of model servers that could not be read."
        yield family(f"{prefix}datalayer_extract_errors_total", "counter", about, ((extractor, extracts),))
    plugin = label_text(("plugin_name", "plugin_type"), (PREFIX_PRODUCER,) * 2)
    for prefix, labels in ((CANONICAL, plugin), (EXTENSION, "")):
        if sources.prefix_blocks is not None:
            blocks = ((labels, sources.prefix_blocks()),)
            yield family(f"{prefix}prefix_indexer_size", "gauge", "Blocks that anybody is believed to hold.", blocks)
        about = "Share of the prompt that the chosen endpoint is believed to hold."
        yield histograms(f"{prefix}prefix_indexer_hit_ratio", about, ((labels, metrics.hit_ratio),))
        about = "Length of that share, at 4 bytes a token."
        yield histograms(f"{prefix}prefix_indexer_hit_bytes", about, ((labels, metrics.hit_bytes),))
    if sources.streams is not None:
        still_open, ever = sources.streams()
        yield family(f"{CANONICAL}extproc_streams_inflight", "gauge", "ext_proc streams open now.", (("", still_open),))
        about = "ext_proc streams that ended. Envoy resets nearly every sound one, so the code tells nothing and is OK."
        yield family(f"{CANONICAL}extproc_streams_total", "counter", about, (('code="OK"', ever - still_open),))


def _ours(metrics: Metrics, sources: Sources) -> Iterator[bytes]:
    about = "Requests refused here, by drop reason (or error code) and status."
    yield family(f"{OURS}refusals_total", "counter", about, _labelled(("reason", "status"), metrics.refusals))
    about = "How exchanges with a decision ended: complete, cut, unanswered, refused."
    outcomes = [(f'outcome="{outcome.value}"', count) for outcome, count in metrics.outcomes.items()]
    yield family(f"{OURS}exchanges_total", "counter", about, outcomes)
    about = "Time until exchanges ended that saw no response headers."
    yield histograms(f"{OURS}unanswered_seconds", about, (("", metrics.unanswered),))
    about = "Connections on which 20 exchanges in a row ended without response headers."
    yield family(f"{OURS}silent_connections_total", "counter", about, (("", metrics.silent_connections),))
    about = "Decisions in which a signal that a scorer needs was unknown for a candidate."
    yield family(f"{OURS}unknown_signal_decisions_total", "counter", about, (("", metrics.unknown_signals),))
    about = "Decisions made without a plugin that failed."
    yield family(f"{OURS}plugin_failures_total", "counter", about, _labelled(("plugin_name",), metrics.plugin_failures))
    about = "Mistakes of our own, contained."
    yield family(f"{OURS}mistakes_total", "counter", about, _labelled(("in",), metrics.mistakes))
    if sources.ejections is not None:
        out, ever = sources.ejections()
        yield family(f"{OURS}ejected_endpoints", "gauge", "Endpoints left out because they failed.", (("", out),))
        yield family(f"{OURS}ejections_total", "counter", "Times that an endpoint was left out.", (("", ever),))


# -- inside ------------------------------------------------------------------------------------------------------

_PROCESS: Final = ProcessCollector(registry=None)
_LABELS: Final = "\0"
_COMMA: Final = "\0,"
_BARE: Final = "{\0}"


def _headed(name: str, kind: str, about: str, lines: list[str]) -> bytes:
    return f"# HELP {name} {about}\n# TYPE {name} {kind}\n{''.join(lines)}".encode() if lines else b""


@cache
def _template(name: str, bounds: tuple[float, ...]) -> str:
    """A histogram's lines, with %d for each cumulative count, then %s for the sum and %d for the count."""
    les = [*map(_go_float, bounds), "+Inf"]
    buckets = "".join(f'{name}_bucket{{{_LABELS},le="{le}"}} %d\n' for le in les)
    return f"{buckets}{name}_sum{_BARE} %s\n{name}_count{_BARE} %d\n"


def _go_float(value: float) -> str:
    """As Go's %g with the shortest digits: 1, 0.0001, 1.048576e+06."""
    _, digits, exponent = Decimal(repr(float(value))).normalize().as_tuple()
    assert isinstance(exponent, int)
    magnitude = len(digits) + exponent - 1
    if -4 <= magnitude < 6 or not value:
        return f"{value:.17g}" if value == int(value) else repr(float(value))
    mantissa = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if digits[1:] else "")
    return f"{mantissa}e{magnitude:+03d}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _labelled(names: Values, counter: Counter) -> Iterator[tuple[str, float]]:
    return ((label_text(names, labels), count) for labels, count in counter)


def _summed(names: Values, rows: Iterable[tuple[Values, float]]) -> list[tuple[str, float]]:
    """Rows of the same labels added up: two samples of one name would spoil the page."""
    sums: dict[Values, float] = {}
    for labels, value in rows:
        sums[labels] = sums.get(labels, 0) + value
    return [(label_text(names, labels), value) for labels, value in sums.items()]


Sets = list[tuple[Values, str, RequestSeries]]


def _filled(sets: Sets, attribute: str) -> Iterator[tuple[Values, str, Histogram]]:
    """The histograms of one family in which anything was observed."""
    for labels, text, series in sets:
        histogram: Histogram = getattr(series, attribute)
        if any(histogram.counts):
            yield labels, text, histogram


def _by_model(rows: Iterable[tuple[Values, str, Histogram]]) -> list[tuple[str, Histogram]]:
    """Histograms added up over everything but the two model names."""
    sums: dict[Values, Histogram] = {}
    for labels, _, histogram in rows:
        total = sums.get(labels[:2])
        if total is None:
            total = sums[labels[:2]] = Histogram(histogram.bounds)
        total.merge(histogram)
    return [(label_text(MODEL, labels), total) for labels, total in sums.items()]


def _split(name: str) -> tuple[str, str]:
    """Namespace and name of an endpoint that is called "namespace/name"."""
    namespace, _, rest = name.rpartition("/")
    return namespace, rest
