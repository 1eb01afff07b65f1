"""The metrics page: names, labels and help of every family, and how accumulators become lines.

In: `Metrics`, the endpoint table, and what else counts, read when somebody scrapes. Out: Prometheus' text format.
Rules here:
- Each family has its name here and nowhere else; the legacy twins of the reference's older dashboards are written from
  the same accumulators, added up over the labels that they lack.
- What is not known is absent: a pool gauge has no value when no endpoint is fresh, rather than its last one.
- The page comes in pieces of a fraction of a millisecond, between which decisions are made. One histogram is read in
  one go and so is consistent in itself; two families may have been read at different moments. What is gone through in
  pieces is a copy of who is there (a list of references), never a dictionary that others write.
- Bounds are spelled as Go spells them (le="1", le="1.048576e+06"): rules and dashboards name them.
Rejected: prometheus_client's `generate_latest`, which takes 240 ms for the largest page (100 full sets of labels, each
with a model of its own: 40,000 lines, 7.3 MB). Filling templates takes 48 ms with 100 endpoints for each of them as
well (62,000 lines, 8.2 MB), 0.5 ms for the slowest piece. Its parser is the judge in the tests, and its process
collector supplies process_*.
Left out: plugin_duration_seconds, which would need a clock inside the pure core, read twice for every plugin (1.3 us
for six of them); what else is not there is in docs/metrics.md.
Source: llm-d router, `pkg/epp/metrics`; the text format, version 0.0.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from functools import cache
from itertools import islice
from math import isnan
from typing import Final

import msgspec
import numpy as np
from prometheus_client import ProcessCollector, generate_latest

from epp.endpoints.table import EndpointTable
from epp.flow.saturation import Detector, Utilization
from epp.telemetry.metrics import Metrics, RequestSeries
from epp.telemetry.series import Histogram

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

CANONICAL: Final = "llm_d_epp_"
OURS: Final = "epp_"
"""What the reference does not have."""
OBJECTIVE: Final = "inference_objective_"
POOL: Final = "inference_pool_"
EXTENSION: Final = "inference_extension_"
SCHEDULER: Final = "llm_d_inference_scheduler_"
PD_HANDLER: Final = "pd-profile-handler"

MODEL: Final = ("model_name", "target_model_name")
REQUEST: Final = (*MODEL, "fairness_id", "priority")
Labels = tuple[str, ...]
"""Names of labels, or values in the order of their names."""
Sample = tuple[Labels, float]
LINES: Final = 200
"""Most samples in a piece of the page."""
SERIES: Final = 6
"""Most histograms in a piece: 40 lines each."""
TICKETS: Final = 250
"""Most requests under way that are gone through between two pieces."""
PREFIX_PRODUCER: Final = "approx-prefix-cache-producer"
INFLIGHT_PRODUCER: Final = "inflight-load-producer"
DETECTOR: Final = "utilization-detector"
SCRAPE_SOURCE: Final = "metrics-data-source"
SCRAPE_EXTRACTOR: Final = "core-metrics-extractor"
GPU_SOURCE: Final = "dcgm-data-source"
GPU_EXTRACTOR: Final = "dcgm-extractor"

REQUEST_HISTOGRAMS: Final = (
    ("request_duration_seconds", "request_duration_seconds", "duration", "From request headers to the answer's end."),
    ("request_size_bytes", "request_sizes", "request_size", "Request bodies."),
    ("response_size_bytes", "response_sizes", "response_size", "Response bodies, where Envoy shows them."),
    ("request_input_tokens", "input_tokens", "input_tokens", "Prompt tokens, as the model server says."),
    ("request_output_tokens", "output_tokens", "output_tokens", "Output tokens, as the model server says."),
    ("request_cached_tokens", "prompt_cached_tokens", "cached_tokens", "Prompt tokens that were cached, likewise."),
    ("request_ntpot_seconds", "normalized_time_per_output_token_seconds", "ntpot", "Duration by output tokens."),
    ("request_streaming_tpot_seconds", "", "tpot", "Streamed: time after the first byte by tokens after the first."),
    ("request_streaming_itl_seconds", "", "itl", "Streamed: time between two pieces of the answer's body."),
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
    detector: Detector | None = None
    """Says how full the pool is, when it is asked; None: that is not told."""
    scrape_errors: Callable[[], tuple[int, int]] = lambda: (0, 0)
    """Pages of model servers that did not come, and that could not be read, ever."""
    gpu_errors: Callable[[], tuple[int, int]] | None = None
    """Likewise of their GPUs' pages; None: they are not fetched."""
    streams: Callable[[], tuple[int, int]] | None = None
    """ext_proc streams, open now and ever opened; None: not told (`--enable-grpc-stream-metrics`)."""
    breaches: Callable[[], Mapping[str, int]] | None = None
    """By limit: ext_proc streams and connections that were ended because of it; None: the transport does not tell."""
    ejections: Callable[[], tuple[int, int]] | None = None
    """Endpoints that are ejected now, and ejections ever."""
    prefix_blocks: Callable[[], int] | None = None
    """Entries of the approximate prefix index; None: there is none."""
    reloads: Callable[[], tuple[int, int]] | None = None
    """Times that a changed configuration was taken, and that one was refused; None: it is in no file."""


def render(metrics: Metrics, sources: Sources) -> Iterator[bytes]:
    """The page, in pieces. Between two the caller may do other work, and everything that is counted may change."""
    for section in (
        _requests(metrics),
        _decisions(metrics),
        _pool(sources),
        _saturation(sources),
        _inflight(metrics, sources),
        _edges(sources),
        _reloads(sources),
        _prefix(metrics, sources),
        _streams(metrics, sources),
        _ours(metrics, sources),
    ):
        yield from section
    yield generate_latest(_PROCESS)


def family(name: str, kind: str, about: str, names: Labels, samples: Iterable[Sample]) -> Iterator[bytes]:
    """Counters or gauges whose labels have these names, in pieces. No samples: nothing."""
    line = f"{name}{{{_template(names)}}} %s\n" if names else f"{name} %s\n"
    lines = (line % (*map(_escaped, values), value) for values, value in samples)
    return _pieces(name, kind, about, lines, LINES)


def histograms(name: str, about: str, names: Labels, samples: Iterable[tuple[Labels, Histogram]]) -> Iterator[bytes]:
    """Histograms of the same bounds, likewise; each is read in one go, so that it is consistent in itself."""
    series = (_histogram(name, label_text(names, values), histogram) for values, histogram in samples)
    return _pieces(name, "histogram", about, series, SERIES)


def label_text(names: Labels, values: Labels) -> str:
    """`a="x",b="y"`, escaped as the format asks."""
    return _template(names) % (*map(_escaped, values),)


# -- sections ----------------------------------------------------------------------------------------------------


def _requests(metrics: Metrics) -> Iterator[bytes]:
    sets = list(metrics.requests)
    decided = [(labels, series.requests, len(series.under_way)) for labels, series in sets if series.requests]
    errors = [((*labels, code), count) for labels, series in sets for code, count in series.errors.items()]
    about = "Requests that got a decision."
    total = [(labels, count) for labels, count, _ in decided]
    yield from family(f"{CANONICAL}request_total", "counter", about, REQUEST, total)
    legacy_total = _summed(((*labels[:2], labels[3]), count) for labels, count in total)
    yield from family(f"{OBJECTIVE}request_total", "counter", about, (*MODEL, "priority"), legacy_total)
    about = "Requests under way."
    running = [(labels, count) for labels, _, count in decided]
    yield from family(f"{CANONICAL}request_running", "gauge", about, REQUEST, running)
    legacy_running = _summed((labels[:1], count) for labels, count in running)
    yield from family(f"{OBJECTIVE}running_requests", "gauge", about, MODEL[:1], legacy_running)
    about = "Requests refused here, or answered by a model server with a status of 400 or more."
    yield from family(f"{CANONICAL}request_error_total", "counter", about, (*REQUEST, "error_code"), errors)
    legacy_errors = _summed(((*labels[:2], labels[4]), count) for labels, count in errors)
    yield from family(f"{OBJECTIVE}request_error_total", "counter", about, (*MODEL, "error_code"), legacy_errors)
    for name, legacy, attribute, about in REQUEST_HISTOGRAMS:
        filled = _filled(sets, attribute)
        yield from histograms(f"{CANONICAL}{name}", about, REQUEST, filled)
        if legacy:
            yield from histograms(f"{OBJECTIVE}{legacy}", about, MODEL, _by_model(filled))
    about = "From request headers to the first byte of the answer's body, where Envoy shows bodies."
    by_streaming = [
        ((*labels, streaming), histogram)
        for streaming, attribute in (("false", "ttft"), ("true", "ttft_streaming"))
        for labels, histogram in _filled(sets, attribute)
    ]
    yield from histograms(f"{CANONICAL}request_ttft_seconds", about, (*REQUEST, "streaming"), by_streaming)


def _decisions(metrics: Metrics) -> Iterator[bytes]:
    about = "Decisions, and requests for which no endpoint was found."
    for prefix, endpoint in ((CANONICAL, "endpoint_name"), (EXTENSION, "pod_name")):
        name = f"{prefix}scheduler_e2e_duration_seconds"
        yield from histograms(name, "Time to decide.", (), [((), metrics.scheduling)])
        names = ("status", "target_model_name", endpoint, "namespace", "port")
        yield from family(f"{prefix}scheduler_attempts_total", "counter", about, names, _attempts(metrics))
    about, rewrite = "Decisions whose target model a rule chose.", ("model_rewrite_name", "model_name", "target_model")
    for prefix in (CANONICAL, EXTENSION):
        yield from family(f"{prefix}model_rewrite_decisions_total", "counter", about, rewrite, metrics.rewrites)
    yield from _plans(metrics)
    about = "From request headers to the decision or the refusal."
    name = f"{CANONICAL}request_processing_duration_seconds"
    yield from histograms(name, about, (), [((), metrics.request_processing)])
    about = "From response headers to the answer's end, for answers that are not streamed."
    name = f"{CANONICAL}response_processing_duration_seconds"
    yield from histograms(name, about, (), [((), metrics.response_processing)])


def _attempts(metrics: Metrics) -> Iterator[Sample]:
    for labels, count in metrics.attempts:
        yield ("success", *labels), count
    for (target,), count in metrics.failed_attempts:
        yield ("failure", target, "", "", ""), count


def _pool(sources: Sources) -> Iterator[bytes]:
    """Gauges of the endpoints that discovery lists and whose page is fresh, as those pages say."""
    table, pool = sources.table, (sources.pool,)
    fresh = table.listed[table.candidates(sources.now()).fresh()]
    # As told: what was sent since, which `column` adds for scorers, would show autoscalers a queue at idle servers.
    told = {column: table.told(column, fresh) for _, column, _ in POOL_GAUGES}
    waiting = zip(map(table.endpoint, fresh.tolist()), told["waiting"].tolist(), strict=True)
    queues = _summed(((*pool, _split(endpoint.name)[1]), queue) for endpoint, queue in waiting if not isnan(queue))
    for name in (f"{CANONICAL}ready_endpoints", f"{POOL}ready_pods"):
        yield from family(name, "gauge", "Endpoints with a fresh page.", ("name",), [(pool, len(fresh))])
    for what, column, about in POOL_GAUGES:
        known = told[column][~np.isnan(told[column])]
        average = [(pool, float(known.mean()))] if len(known) else []
        deviation = [(pool, float(known.std()))] if len(known) else []
        for name in (f"{CANONICAL}average_{what}", f"{POOL}average_{what}"):
            yield from family(name, "gauge", f"Average: {about}.", ("name",), average)
        name = f"{CANONICAL}std_dev_{what}"
        yield from family(name, "gauge", f"Standard deviation: {about}.", ("name",), deviation)
    about = "Requests in the endpoint's queue."
    for name, label in (
        (f"{CANONICAL}per_endpoint_queue_size", "model_server_endpoint"),
        (f"{POOL}per_pod_queue_size", "model_server_pod"),
    ):
        yield from family(name, "gauge", about, ("name", label), queues)


def _saturation(sources: Sources) -> Iterator[bytes]:
    """How full the pool is, as admission asks it, but over every endpoint that discovery lists."""
    detector, pool = sources.detector, sources.pool
    if detector is None:
        return
    saturation = detector.saturation(sources.table.candidates(sources.now()))
    about = "How full the pool is: 0 idle, 1 or more full."
    names, value = ("inference_pool", "stage"), [((pool, "effective"), saturation.value)]
    for prefix in (CANONICAL, EXTENSION):
        yield from family(f"{prefix}flow_control_pool_saturation", "gauge", about, names, value)
    if isinstance(detector, Utilization):
        about = "Endpoints that count as full because nothing recent is known of them."
        name, stale = f"{CANONICAL}flow_control_stale_endpoints", [((DETECTOR,), saturation.unknown)]
        yield from family(name, "gauge", about, ("detector",), stale)


def _inflight(metrics: Metrics, sources: Sources) -> Iterator[bytes]:
    """Counts of every endpoint and flow, also of endpoints that left while requests run on them. A listed endpoint on
    which nothing runs has one series, of no flow. There are no more series than requests under way and endpoints."""
    table, counts = sources.table, dict[Labels, tuple[float, float]]()
    for seen, (key, tokens) in enumerate(_shares(metrics, table), 1):
        requests, others = counts.get(key, (0, 0.0))
        counts[key] = requests + 1, others + tokens
        if seen % TICKETS == 0:
            yield b""
    busy = {name for name, _, _ in counts}
    for endpoint in map(table.endpoint, table.listed.tolist()):
        if endpoint.name not in busy:
            counts[endpoint.name, "", ""] = 0, 0.0
    names = ("endpoint_name", "namespace", "producer_name", "fairness_id", "priority")
    for which, what, about in (
        (0, "requests", "Requests under way on each endpoint."),
        (1, "tokens", "Prompt tokens under way on each endpoint, of requests whose answer has not begun."),
    ):
        samples = ((_inflight_labels(key), count[which]) for key, count in counts.items())
        yield from family(f"{CANONICAL}inflight_{what}", "gauge", about, names, samples)


def _shares(metrics: Metrics, table: EndpointTable) -> Iterator[tuple[Labels, float]]:
    """Of each request under way, where it is counted: name of the endpoint, fairness id, priority; and its tokens."""
    for labels, series in metrics.requests:
        flow = labels[2:]
        for ticket in list(series.under_way):
            if not ticket.hold.released:
                yield (ticket.endpoint.name, *flow), ticket.hold.tokens
            for hold in ticket.helpers:
                if not hold.released:
                    yield (table.endpoint(hold.slot).name, *flow), hold.tokens


def _inflight_labels(key: Labels) -> Labels:
    namespace, name = _split(key[0])
    return (name, namespace, INFLIGHT_PRODUCER, *key[1:])


def _edges(sources: Sources) -> Iterator[bytes]:
    build = [((sources.commit, sources.version), 1)]
    for prefix in (CANONICAL, EXTENSION):
        yield from family(f"{prefix}info", "gauge", "The build.", ("commit", "build_ref"), build)
    errors = [((SCRAPE_SOURCE, SCRAPE_EXTRACTOR), sources.scrape_errors())]
    if sources.gpu_errors is not None:
        errors.append(((GPU_SOURCE, GPU_EXTRACTOR), sources.gpu_errors()))
    polls: list[Sample] = [((source,), failed) for (source, _), (failed, _) in errors]
    extracts: list[Sample] = [(who, failed) for who, (_, failed) in errors]
    for prefix in (CANONICAL, SCHEDULER):
        about = "Pages of model servers that did not come."
        name = f"{prefix}datalayer_poll_errors_total"
        yield from family(name, "counter", about, ("source_type",), polls)
        about = "Pages of model servers that could not be read."
        name, labels = f"{prefix}datalayer_extract_errors_total", ("source_type", "extractor_type")
        yield from family(name, "counter", about, labels, extracts)


def _reloads(sources: Sources) -> Iterator[bytes]:
    if sources.reloads is not None:
        taken, refused = sources.reloads()
        about = "Times that the configuration file changed, and whether what it says then was taken."
        counts: list[Sample] = [(("taken",), taken), (("refused",), refused)]
        yield from family(f"{OURS}config_reloads_total", "counter", about, ("result",), counts)


def _prefix(metrics: Metrics, sources: Sources) -> Iterator[bytes]:
    plugin = (PREFIX_PRODUCER, PREFIX_PRODUCER)
    values: Labels
    for prefix, names, values in ((CANONICAL, ("plugin_name", "plugin_type"), plugin), (EXTENSION, (), ())):
        if sources.prefix_blocks is not None:
            about = "Blocks that anybody is believed to hold."
            blocks = [(values, sources.prefix_blocks())]
            yield from family(f"{prefix}prefix_indexer_size", "gauge", about, names, blocks)
        about = "Share of the prompt that the chosen endpoint is believed to hold."
        yield from histograms(f"{prefix}prefix_indexer_hit_ratio", about, names, [(values, metrics.hit_ratio)])
        about = "Length of that share, at 4 bytes a token."
        yield from histograms(f"{prefix}prefix_indexer_hit_bytes", about, names, [(values, metrics.hit_bytes)])


def _streams(metrics: Metrics, sources: Sources) -> Iterator[bytes]:
    if sources.breaches is not None:
        about = "ext_proc streams and connections that were ended because a limit was broken."
        breaches = [((limit,), count) for limit, count in sources.breaches().items()]
        yield from family(f"{OURS}extproc_limit_breaches_total", "counter", about, ("limit",), breaches)
    if sources.streams is None:
        return
    still_open, ever = sources.streams()
    name = f"{CANONICAL}extproc_streams_inflight"
    yield from family(name, "gauge", "ext_proc streams open now.", (), [((), still_open)])
    about = "ext_proc streams that ended. Envoy resets nearly every sound one, so the code tells nothing and is OK."
    yield from family(f"{CANONICAL}extproc_streams_total", "counter", about, ("code",), [(("OK",), ever - still_open)])
    if metrics.streams.count:
        name = f"{CANONICAL}extproc_stream_duration_seconds"
        yield from histograms(name, "How long ext_proc streams were open.", (), [((), metrics.streams)])


def _ours(metrics: Metrics, sources: Sources) -> Iterator[bytes]:
    about = "Requests refused here, by drop reason (or error code) and status."
    yield from family(f"{OURS}refusals_total", "counter", about, ("reason", "status"), metrics.refusals)
    about = "How exchanges with a decision ended: complete, cut, unanswered, refused."
    outcomes = [((outcome.value,), count) for outcome, count in metrics.outcomes.items()]
    yield from family(f"{OURS}exchanges_total", "counter", about, ("outcome",), outcomes)
    about = "Time until exchanges ended that saw no response headers."
    yield from histograms(f"{OURS}unanswered_seconds", about, (), [((), metrics.unanswered)])
    about = "Connections on which 20 exchanges in a row ended without response headers."
    silent = [((), metrics.silent_connections)]
    yield from family(f"{OURS}silent_connections_total", "counter", about, (), silent)
    about = "Decisions in which a signal that a scorer needs was unknown for a candidate."
    unknown = [((), metrics.unknown_signals)]
    yield from family(f"{OURS}unknown_signal_decisions_total", "counter", about, (), unknown)
    about = "Decisions made without a plugin that failed, or was left out for having failed, or without a stage."
    failures = metrics.plugin_failures
    yield from family(f"{OURS}plugin_failures_total", "counter", about, ("plugin_name", "kind"), failures)
    about = "Mistakes of our own, contained."
    yield from family(f"{OURS}mistakes_total", "counter", about, ("in",), metrics.mistakes)
    if sources.ejections is not None:
        out, ever = sources.ejections()
        about = "Endpoints left out because they failed."
        yield from family(f"{OURS}ejected_endpoints", "gauge", about, (), [((), out)])
        yield from family(f"{OURS}ejections_total", "counter", "Times that an endpoint was left out.", (), [((), ever)])


# -- inside ------------------------------------------------------------------------------------------------------

_PROCESS: Final = ProcessCollector(registry=None)
_LABELS: Final = "\0"
_COMMA: Final = "\0,"
_BARE: Final = "{\0}"


def _pieces(name: str, kind: str, about: str, lines: Iterator[str], size: int) -> Iterator[bytes]:
    """Lines (or groups of lines) of one family under its head, so many at once, each made when its piece is."""
    head = f"# HELP {name} {about}\n# TYPE {name} {kind}\n"
    while text := "".join(islice(lines, size)):
        yield (head + text).encode()
        head = ""


def _histogram(name: str, labels: str, histogram: Histogram) -> str:
    counts = (*histogram.cumulative(),)
    text = _histogram_template(name, histogram.bounds) % (*counts, repr(histogram.total), counts[-1])
    return text.replace(_LABELS, labels) if labels else text.replace(_COMMA, "").replace(_BARE, "")


@cache
def _template(names: Labels) -> str:
    return ",".join(f'{name}="%s"' for name in names)


@cache
def _histogram_template(name: str, bounds: tuple[float, ...]) -> str:
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


def _plans(metrics: Metrics) -> Iterator[bytes]:
    """The older handler has a family of its own; the twins do not name the handler."""
    about, names = "Decisions by the stages that came of them.", ("plugin_name", "plugin_type", "model_name")
    for name, older in (("disagg_decision_total", False), ("pd_decision_total", True)):
        plans = [each for each in metrics.plans if (each[0][1] == PD_HANDLER) is older]
        yield from family(f"{CANONICAL}{name}", "counter", about, (*names, "decision_type"), plans)
        twins = _summed((labels[2:], count) for labels, count in plans)
        yield from family(f"{SCHEDULER}{name}", "counter", about, ("model_name", "decision_type"), twins)


def _summed(rows: Iterable[Sample]) -> list[Sample]:
    """Rows of the same labels added up: two samples of one name would spoil the page."""
    sums: dict[Labels, float] = {}
    for labels, value in rows:
        sums[labels] = sums.get(labels, 0) + value
    return list(sums.items())


def _filled(sets: list[tuple[Labels, RequestSeries]], attribute: str) -> list[tuple[Labels, Histogram]]:
    """The histograms of one family in which anything was observed."""
    found: list[tuple[Labels, Histogram]] = [(labels, getattr(series, attribute)) for labels, series in sets]
    return [(labels, histogram) for labels, histogram in found if any(histogram.counts)]


def _by_model(rows: list[tuple[Labels, Histogram]]) -> Iterator[tuple[Labels, Histogram]]:
    """Histograms added up over everything but the two model names, one when it is asked for."""
    groups: dict[Labels, list[Histogram]] = {}
    for labels, histogram in rows:
        groups.setdefault(labels[:2], []).append(histogram)
    for models, group in groups.items():
        if len(group) == 1:
            yield models, group[0]
            continue
        total = Histogram(group[0].bounds)
        for histogram in group:
            total.merge(histogram)
        yield models, total


def _split(name: str) -> tuple[str, str]:
    """Namespace and name of an endpoint that is called "namespace/name"."""
    namespace, _, rest = name.rpartition("/")
    return namespace, rest
