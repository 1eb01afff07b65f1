"""The reference's hermetic cases, in effect, over real Kubernetes objects.

Each case is pods with their pages, objects in a real API server, messages as Envoy sends them, and what must come back:
an endpoint and the body that the model server gets, or a refusal; and what is counted. The cases of v1.3 run in this
process and against `epp serve`; what older and younger versions add runs in this process.

Where we answer otherwise, on purpose:
- Replies set the destination and nothing else: the client's headers stay as they are, so none is set again, and neither
  Content-Length (in full duplex Envoy takes it away) nor x-went-into-resp-headers. Control headers are removed.
- Bodies are the client's bytes with the model's name in its place, not JSON written anew with sorted keys.
- A refusal is JSON in the words of the client's API with our message, not `inference gateway: <Code> - <text>` (or
  `inference error:`, v1.5). Statuses are the reference's, but for an empty pool, which is 503 for GET and POST alike
  (the reference: 500 for GET). No model at all comes before anything about pods, as there.
- A GET goes through the scheduler and the subset; the reference draws a pod by lot.
- Responses pass piece by piece, whatever their type; the reference keeps JSON back and sends it in one piece.
- Tokens are counted of requests that we routed. A response out of nowhere (no request before it) is Envoy's own.
- The endpoint is chosen by weighted scores in every version; v0.5 has a tree of filters. Where the two differ the test
  says so. Nobody below priority 0 passes when the mean of max(q/5, kv/0.8) reaches 1 (v1.5); v0.5 asks for one pod with
  q <= 5 and kv <= 0.8.
- An InferenceModel without criticality is Standard, which has priority 0 and is never refused; in v0.5 whatever is not
  Critical may be. Unknown models are as v0.5 has them (Sheddable), not 404 (v0.4).
- Where the reference's fixtures have no :path, ours have /v1/completions, since Envoy always sends one.

- A body without request headers before it (v1.0 to v1.2 send one) breaks the protocol; Envoy sends no such stream.

Elsewhere: bodies handed over BUFFERED (v0.1 to v0.3) are in tests/transcripts and tests/e2e; how pages are polled is in
tests/signals/test_scrape.py. Left out: v1.5's spans, its gRPC parser, its attribute reporter and its notifications of
objects to plugins, which are not there yet.
Source: Gateway API Inference Extension v0.1 to v1.5, test/integration.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import msgspec
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep

from epp.discovery.kube.objects import Kind, Pool
from epp.discovery.kube.view import NamedPool, SelectedPods
from epp.endpoints.selector import parse_selector
from epp.extproc.events import (
    BODY,
    BodylessRequest,
    Modes,
    RequestData,
    RequestEnded,
    RequestEvent,
    RequestStarted,
    ResponseData,
    ResponseEnded,
    ResponseEvent,
    ResponseStarted,
)
from epp.headers import Headers
from tests.conformance.conftest import Cluster
from tests.conformance.hermetic import Harness, Inside, Process, Server, grown, inside, labelled, process
from tests.conformance.objects import APP, POOL, Namespace, rule
from tests.extproc import oracle
from tests.kube.client import OBJECTIVES, OLD_OBJECTIVES, OLD_REWRITES, REWRITES, Resource

pytestmark = pytest.mark.anyio

T2, T3 = "sql-lora-1fdg2", "sql-lora-1fdg3"
DESTINATION: Final = "x-gateway-destination-endpoint"
Says = tuple[RequestEvent | ResponseEvent, ...]


class Routed(msgspec.Struct, frozen=True):
    """The request goes to a pod, and asks it for this model."""

    pod: int
    model: str


class Refused(msgspec.Struct, frozen=True):
    status: int
    words: str
    """Part of the message."""


class Case(msgspec.Struct, frozen=True):
    name: str
    servers: tuple[Server, ...]
    says: Callable[[Harness], Says]
    """What Envoy sends; a subset names endpoints, which the harness knows."""
    expected: Routed | Refused
    counted: tuple[str, str, str] | None = None
    """Labels of the one request that is counted: model_name, target_model_name, priority. None: none is."""
    rewritten: tuple[str, str, str] | None = None
    """Labels of the one rewrite that is counted: model_rewrite_name, model_name, target_model. None: none is."""


def headers(*more: tuple[str, str]) -> Headers:
    start = ((":method", b"POST"), (":path", b"/v1/completions"), ("hi", b"mom"))
    return (*start, *((name, value.encode()) for name, value in more))


def llm(
    prompt: str,
    model: str,
    target: str,
    *,
    subset: Callable[[Harness], tuple[str, ...]] | None = None,
    cut: int = 0,
    objective: str | None = None,
) -> Callable[[Harness], Says]:
    """The standard request: the objective is named as the model, the target by a header. `cut`: in two pieces."""
    named = [("x-request-id", "test-request-id"), ("x-gateway-inference-objective", objective or model)]
    head = headers(*named, ("x-gateway-model-name-rewrite", target))
    body = completion(prompt, model)

    def says(harness: Harness) -> Says:
        allowed = None if subset is None else subset(harness)
        start = RequestStarted(head, subset=allowed)
        pieces = (RequestData(body[:cut], allowed),) if cut else ()
        return (start, *pieces, RequestEnded(BODY, body[cut:], allowed))

    return says


def completion(prompt: str, model: str) -> bytes:
    asked = {"max_tokens": 100, "model": model, "prompt": prompt, "temperature": 0}
    return json.dumps(asked, separators=(",", ":")).encode()


def plain(body: bytes) -> Callable[[Harness], Says]:
    return lambda harness: (RequestStarted(headers()), RequestEnded(BODY, body))


def bodyless(*more: tuple[str, str]) -> Callable[[Harness], Says]:
    head = ((":method", b"GET"), (":path", b"/v1/models"), *((name, value.encode()) for name, value in more))
    return lambda harness: (BodylessRequest(head),)


def only(*pods: int) -> Callable[[Harness], tuple[str, ...]]:
    return lambda harness: tuple(harness.address(pod) for pod in pods)


COMMON: Final = (
    # Scores of pods, worked out by hand: queue + kv + lora (1 for a base model; an unknown number of slots scores 0.5).
    Case(  # .7+.8+1, 1+.9+1, 0+.8+1
        "1: the shortest queue and the emptiest cache",
        (Server(3, 0.2), Server(0, 0.1), Server(10, 0.2)),
        llm("test1", "my-model", "my-model-12345"),
        Routed(1, "my-model-12345"),
        ("my-model", "my-model-12345", "2"),
    ),
    Case(  # 1+.8+.5, 1+.9+1, 0+.8+.5
        "2: the pod that has the adapter",
        (Server(0, 0.2, ("foo", "bar")), Server(0, 0.1, ("foo", T2)), Server(10, 0.2, ("foo", "bar"))),
        llm("test2", "sql-lora", T2),
        Routed(1, T2),
        ("sql-lora", T2, "2"),
    ),
    Case(  # 1+.8+.5, 1+.6+1, 1+.7+.5
        "3: the adapter where queues are equal",
        (Server(10, 0.2, ("foo", "bar")), Server(10, 0.4, ("foo", T2)), Server(10, 0.3, ("foo",))),
        llm("test3", "sql-lora", T2),
        Routed(1, T2),
        ("sql-lora", T2, "2"),
    ),
    Case(  # .4+.8+1, 1+.15+.5, 0+.1+.5
        "4: the adapter where others have full caches",
        (Server(6, 0.2, ("foo", "bar", T2)), Server(0, 0.85, ("foo",)), Server(10, 0.9, ("foo",))),
        llm("test4", "sql-lora", T2),
        Routed(0, T2),
        ("sql-lora", T2, "2"),
    ),
    Case(
        "5: a body that is no JSON",
        (Server(0, 0.2, ("foo", "bar")),),
        plain(b"no healthy upstream"),
        Refused(400, "the request body is not valid JSON"),
    ),
    Case(  # 1+.8+1, 1+.15+1; the cut is inside the model's name
        "6: a body in two pieces, cut inside the name of the model",
        (Server(4, 0.2, ("foo", "bar", T3)), Server(4, 0.85, ("foo", T3))),
        llm("test6", "sql-lora-sheddable", T3, cut=34),
        Routed(0, T3),
        ("sql-lora-sheddable", T3, "0"),
    ),
    Case(
        "7: headers alone, and no pods",
        (),
        bodyless(("content-type", "application/json")),
        Refused(503, "the pool has no endpoints"),
    ),
    Case(
        "8: no model, and no pods",
        (),
        plain(b'{"hello":"world"}'),
        Refused(400, "`model` is missing or empty"),
    ),
    Case(
        "8 of v1.5: a prompt and no model",
        (),
        plain(b'{"prompt":"hello world"}'),
        Refused(400, "`model` is missing or empty"),
    ),
    Case(
        "9: a subset of all",
        (Server(0, 0.2, ("foo",)), Server(0, 0.1, ("foo", T2)), Server(10, 0.2, ("foo",))),
        llm("test2", "sql-lora", T2, subset=only(0, 1, 2)),
        Routed(1, T2),
        ("sql-lora", T2, "2"),
    ),
    Case(
        "10: a subset of one",
        (Server(0, 0.2, ("foo",)), Server(0, 0.1, ("foo", T2)), Server(10, 0.2, ("foo",))),
        llm("test2", "sql-lora", T2, subset=only(2)),
        Routed(2, T2),
        ("sql-lora", T2, "2"),
    ),
    Case(
        "11: a subset of nobody",
        (Server(0, 0.2, ("foo",)), Server(0, 0.1, ("foo", T2))),
        llm("test2", "sql-lora", T2, subset=only(98)),
        Refused(503, "none of the pool's endpoints is in the subset that the gateway allows"),
    ),
    Case(
        "12: a model that is not rewritten",
        (Server(4, 0.2, ("foo", "bar", T3)),),
        llm("test6", "direct-model", "direct-model", cut=34),
        Routed(0, "direct-model"),
        ("direct-model", "direct-model", "2"),
    ),
    Case(
        "13: a model that an InferenceModelRewrite rewrites",
        (Server(0, 0.1, ("foo", "rewritten-model")),),
        llm("test-rewrite", "model-to-be-rewritten", "model-to-be-rewritten"),
        Routed(0, "rewritten-model"),
        ("model-to-be-rewritten", "rewritten-model", "0"),
        ("rewrite-test", "model-to-be-rewritten", "rewritten-model"),
    ),
    Case(
        "13, and the client's own rewrite header counts less",
        (Server(0, 0.1, ("foo", "rewritten-model")),),
        llm("test-rewrite", "model-to-be-rewritten", "something-else"),
        Routed(0, "rewritten-model"),
        ("model-to-be-rewritten", "rewritten-model", "0"),
        ("rewrite-test", "model-to-be-rewritten", "rewritten-model"),
    ),
    Case(
        "an objective that nobody wrote is priority 0, and no error",
        (Server(0, 0.1),),
        llm("hello", "my-model", "my-model", objective="no-such-objective"),
        Routed(0, "my-model"),
        ("my-model", "my-model", "0"),
    ),
    Case(
        "v1.5: an objective of another name than the model",
        (Server(0, 0.1),),
        llm("hello", "my-model", "my-model", objective="inference-objective-with-priority-4"),
        Routed(0, "my-model"),
        ("my-model", "my-model", "4"),
    ),
)


async def populate(namespace: Namespace, objectives: Resource = OBJECTIVES, rewrites: Resource = REWRITES) -> None:
    """Upstream's fixtures: 5 objectives and 1 rewrite."""
    for name, priority in {
        "sql-lora": 2,
        "sql-lora-sheddable": None,
        "my-model": 2,
        "direct-model": 2,
        "inference-objective-with-priority-4": 4,
    }.items():
        await namespace.objective(objectives, name, priority)
    await namespace.rewrite(rewrites, "rewrite-test", [rule("rewritten-model", "model-to-be-rewritten")])


REQUEST: Final = ("model_name", "target_model_name", "priority")
REWRITE: Final = ("model_rewrite_name", "model_name", "target_model")


async def check(harness: Harness, case: Case) -> None:
    """Play a case, and look at what is answered and what is counted."""
    await harness.be(case.servers)
    before = await harness.series()
    says = case.says(harness)
    assert isinstance(says[0], RequestStarted)
    replies = await harness.ask(messages(says))
    if isinstance(case.expected, Routed):
        sent = b"".join(event.data for event in says if isinstance(event, RequestData | RequestEnded))
        asked = json.loads(sent)["model"]
        body = sent.replace(f'"model":"{asked}"'.encode(), f'"model":"{case.expected.model}"'.encode())
        told = [name for name, _ in says[0].headers if name.startswith("x-gateway-")]
        check_routed(replies, harness.address(case.expected.pod), body, told)
    else:
        check_refused(replies, case.expected)
    after = await harness.series()
    assert grown(before, after, "inference_objective_request_total") == one(REQUEST, case.counted)
    flow = None if case.counted is None else (*case.counted, "default-flow")
    assert grown(before, after, "llm_d_epp_request_total") == one((*REQUEST, "fairness_id"), flow)
    for prefix in ("inference_extension", "llm_d_epp"):
        assert grown(before, after, f"{prefix}_model_rewrite_decisions_total") == one(REWRITE, case.rewritten)
    assert labelled(after, "inference_pool_ready_pods") == {frozenset({("name", POOL)}): len(case.servers)}
    assert sum(grown(before, after, "inference_objective_request_error_total").values()) == (case.counted is None)


def one(names: tuple[str, ...], values: tuple[str, ...] | None) -> dict[frozenset[tuple[str, str]], float]:
    """A single sample of 1, or none."""
    return {} if values is None else {frozenset(zip(names, values, strict=True)): 1.0}


def messages(says: Says) -> list[ep.ProcessingRequest]:
    return [oracle.message(event, None if number else Modes()) for number, event in enumerate(says)]


def check_routed(replies: list[ep.ProcessingResponse], address: str, body: bytes, control: list[str]) -> None:
    """`control`: the client's headers that the model server must not see."""
    head, *rest = replies
    common = head.request_headers.response
    assert common.clear_route_cache
    mutation = common.header_mutation
    assert [(each.header.key, each.header.raw_value) for each in mutation.set_headers] == [
        (DESTINATION, address.encode())
    ]
    assert list(mutation.remove_headers) == control
    assert head.dynamic_metadata["envoy.lb"] == {DESTINATION: address}
    pieces = [each.request_body.response.body_mutation.streamed_response for each in rest]
    assert b"".join(piece.body for piece in pieces) == body
    assert [piece.end_of_stream for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def check_refused(replies: list[ep.ProcessingResponse], expected: Refused) -> None:
    (reply,) = replies
    immediate = reply.immediate_response
    assert immediate.status.code == expected.status
    assert expected.words in json.loads(immediate.body)["error"]["message"]


# -- v1.3 and v1.5, over the objects of llm-d and over the older group's ----------------------------------------------


@pytest.mark.parametrize("case", COMMON, ids=lambda case: case.name)
async def test_a_case_of_the_reference_over_objects_of_llm_d(cluster: Cluster, case: Case) -> None:
    namespace = await cluster.namespace()
    await namespace.pool(8000)
    await populate(namespace)
    async with inside(cluster, namespace, NamedPool(namespace.name, POOL), 5, 1) as harness:
        await check(harness, case)


@pytest.mark.parametrize("case", COMMON, ids=lambda case: case.name)
async def test_a_case_of_the_reference_over_objects_of_the_older_group(older_cluster: Cluster, case: Case) -> None:
    namespace = await older_cluster.namespace()
    await namespace.pool(8000)
    await populate(namespace, OLD_OBJECTIVES, OLD_REWRITES)
    async with inside(older_cluster, namespace, NamedPool(namespace.name, POOL), 5, 1) as harness:
        await check(harness, case)


@pytest.fixture(scope="module")
async def running(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Process]:
    """One `epp serve` for all cases: pods come, change and leave, as in a cluster."""
    namespace = await cluster.namespace()
    await populate(namespace)
    async with process(cluster, namespace, tmp_path_factory.mktemp("picker")) as harness:
        yield harness
        log = harness.picker.process.output(lines=10_000)
    assert "Traceback" not in log, log


@pytest.mark.parametrize("case", COMMON, ids=lambda case: case.name)
async def test_a_case_of_the_reference_by_a_process_that_reads_pages_over_http(running: Process, case: Case) -> None:
    await check(running, case)


# -- without definitions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [each for each in COMMON if each.counted is None or not each.name.startswith("13")],
    ids=lambda case: case.name,
)
async def test_without_definitions_everybody_has_priority_0(bare_cluster: Cluster, case: Case) -> None:
    """Standalone without a pool (--endpoint-selector): nobody says what is important, and nothing is rewritten."""
    namespace = await bare_cluster.namespace()
    scope = SelectedPods(namespace.name, POOL, Pool(parse_selector(f"app={APP}"), (8000,)))
    counted = None if case.counted is None else (*case.counted[:2], "0")
    async with inside(bare_cluster, namespace, scope) as harness:
        await check(harness, msgspec.structs.replace(case, counted=counted))


# -- bodyless requests, responses --------------------------------------------------------------------------------------


@pytest.fixture
def one_pod(cluster: Cluster) -> Callable[[Server], AbstractAsyncContextManager[Inside]]:
    """Opens a harness over one pod with this page."""
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def opened(server: Server) -> AsyncIterator[Inside]:
        namespace = await cluster.namespace()
        await namespace.pool(8000)
        async with inside(cluster, namespace, NamedPool(namespace.name, POOL)) as harness:
            await harness.be([server])
            yield harness

    return opened


OnePod = Callable[[Server], AbstractAsyncContextManager[Inside]]
JSON: Final[Headers] = ((":status", b"200"), ("content-type", b"application/json"))
SSE: Final[Headers] = ((":status", b"200"), ("content-type", b"text/event-stream"))
USAGE: Final = b'{"usage":{"prompt_tokens":7,"completion_tokens":10,"total_tokens":17}}'
STREAM: Final = (b"data: {}\n\n", b"data: %b\n\ndata: [DONE]\n\n" % USAGE)


async def test_14_a_request_without_a_body_is_routed_by_one_reply_to_its_headers(one_pod: OnePod) -> None:
    async with one_pod(Server(0, 0.0, ("foo",))) as harness:
        replies = await harness.ask(messages(bodyless(("content-type", "text/event-stream"))(harness)))
        (reply,) = replies
        (header,) = reply.request_headers.response.header_mutation.set_headers
        assert (header.header.key, header.header.raw_value) == (DESTINATION, b"192.168.1.1:8000")
        assert reply.dynamic_metadata["envoy.lb"] == {DESTINATION: "192.168.1.1:8000"}


@pytest.mark.parametrize(
    ("head", "pieces"),
    [
        pytest.param(JSON, (b'{"a":', b"1}"), id="15: JSON in two pieces"),
        pytest.param(JSON, (b"no healthy upstream",), id="16: no JSON at all"),
        pytest.param(JSON, (USAGE, b""), id="17: JSON, and an empty end"),
        pytest.param(SSE, (*STREAM, b""), id="18: a stream, and an empty end"),
    ],
)
async def test_a_response_passes_piece_by_piece_and_its_tokens_are_counted(
    one_pod: OnePod, head: Headers, pieces: tuple[bytes, ...]
) -> None:
    """Alone, as upstream sends it, nothing is counted of it; behind its request its usage is."""
    response: Says = (
        ResponseStarted(head),
        *map(ResponseData, pieces[:-1]),
        ResponseEnded(BODY, pieces[-1]),
    )
    async with one_pod(Server(4, 0.2, (T3,))) as harness:
        check_passed(await harness.ask(messages(response)), pieces)
        assert labelled(await harness.series(), "inference_objective_input_tokens_sum") == {}
        request = llm("hello", "sql-lora", T3)(harness)
        replies = await harness.ask(messages((*request, *response)))
        check_passed(replies[2:], pieces)
        model = frozenset({("model_name", "sql-lora"), ("target_model_name", T3)})
        tells = USAGE in b"".join(pieces)
        series = await harness.series()
        assert labelled(series, "inference_objective_input_tokens_count").get(model, 0.0) == tells
        assert labelled(series, "inference_objective_input_tokens_sum").get(model, 0.0) == 7 * tells
        assert labelled(series, "inference_objective_output_tokens_sum").get(model, 0.0) == 10 * tells


def check_passed(replies: list[ep.ProcessingResponse], pieces: tuple[bytes, ...]) -> None:
    head, *rest = replies
    assert head == ep.ProcessingResponse(response_headers=ep.HeadersResponse())
    streamed = [each.response_body.response.body_mutation.streamed_response for each in rest]
    assert tuple(piece.body for piece in streamed) == pieces
    assert [piece.end_of_stream for piece in streamed] == [False] * (len(pieces) - 1) + [True]


async def test_of_v1_5_a_path_that_is_not_known_passes_untouched(cluster: Cluster) -> None:
    """As upstream's passthrough parser: any bytes, no model in the labels, and the objective's priority."""
    namespace = await cluster.namespace()
    await namespace.pool(8000)
    await namespace.objective(OBJECTIVES, "my-model", 2)
    async with inside(cluster, namespace, NamedPool(namespace.name, POOL), 1, 0) as harness:
        await harness.be([Server(0, 0.1)])
        head = ((":method", b"POST"), (":path", b"/anything"), ("x-gateway-inference-objective", b"my-model"))
        replies = await harness.ask(messages((RequestStarted(head), RequestEnded(BODY, b"\x00raw"))))
        check_routed(replies, harness.address(0), b"\x00raw", ["x-gateway-inference-objective"])
        counted = labelled(await harness.series(), "inference_objective_request_total")
        assert counted == one(REQUEST, ("", "", "2"))


# -- v0.5: InferenceModels over a pool of v1alpha2 ---------------------------------------------------------------------

OLD_POOL: Final = (Kind.LEGACY_POOL,)
MODELS: Final = (
    # Upstream's fixtures, and one that is Sheddable by name.
    ("sql-lora", "Critical", (T2,)),
    ("sql-lora-sheddable", None, (T3,)),
    ("my-model", "Critical", ("my-model-12345",)),
    ("direct-model", "Critical", ()),
    ("batch", "Sheddable", (T3,)),
)
ALL_T3 = ("foo", "bar", T3)
SATURATED = (Server(6, 0.2, ALL_T3), Server(0, 0.85, (T3,)), Server(10, 0.9, (T3,)))
PARTLY = (Server(4, 0.2, ALL_T3), Server(0, 0.85, (T3,)), Server(10, 0.9, (T3,)))
ROOM = (Server(2, 0.2, ALL_T3), Server(0, 0.3, (T3,)), Server(6, 0.4, (T3,)))


def v05(prompt: str, model: str, cut: int = 0) -> Callable[[Harness], Says]:
    """v0.5 knows no header of ours: the model says it all."""
    body = completion(prompt, model)
    head = RequestStarted(headers())
    if not cut:
        return lambda harness: (head, RequestEnded(BODY, body))
    return lambda harness: (head, RequestData(body[:cut]), RequestEnded(BODY, body[cut:]))


V05: Final = (
    Case(  # as case 1
        "a base model goes to the shortest queue",
        (Server(3, 0.2), Server(0, 0.1), Server(10, 0.2)),
        v05("test1", "my-model"),
        Routed(1, "my-model-12345"),
        ("my-model", "my-model-12345", "1"),
    ),
    Case(  # as case 2
        "an adapter goes where it runs",
        (Server(0, 0.2, ("foo", "bar")), Server(0, 0.1, ("foo", T2)), Server(10, 0.2, ("foo", "bar"))),
        v05("test2", "sql-lora"),
        Routed(1, T2),
        ("sql-lora", T2, "1"),
    ),
    Case(  # 190/194+.8+.5, 0+.9+1, 1+.8+.5
        "an adapter does not go where it runs when that queue is far too long",
        (Server(10, 0.2, ("foo", "bar")), Server(200, 0.1, ("foo", T2)), Server(6, 0.2, ("foo",))),
        v05("test3", "sql-lora"),
        Routed(2, T2),
        ("sql-lora", T2, "1"),
    ),
    Case(  # mean of 6/5, .85/.8, 10/5
        "what is sheddable is refused when all are saturated",
        SATURATED,
        v05("test4", "batch"),
        Refused(429, "saturated, and this request's priority is -1"),
    ),
    Case(
        "a model that nobody listed is sheddable",
        SATURATED,
        v05("test4", "no-such-model"),
        Refused(429, "saturated, and this request's priority is -1"),
    ),
    Case(  # .4+.8+1, 1+.15+1, 0+.1+1. Upstream: 429, since Standard is not Critical
        "what is standard is not refused, unlike upstream",
        SATURATED,
        v05("test4", "sql-lora-sheddable"),
        Routed(0, T3),
        ("sql-lora-sheddable", T3, "0"),
    ),
    Case(  # mean of max(4/5, .2/.8), .85/.8, 10/5: 1.29. Upstream: pod 1, since pod 0 alone has room
        "what is sheddable is refused when one has room and the mean has none, unlike upstream",
        PARTLY,
        v05("test5", "batch"),
        Refused(429, "saturated, and this request's priority is -1"),
    ),
    Case(  # saturation: mean of 2/5, .3/.8, 6/5 is .66. Scores: 4/6+.8+1, 1+.7+1, 0+.6+1
        "what is sheddable passes when there is room",
        ROOM,
        v05("test5", "batch", cut=34),
        Routed(1, T3),
        ("batch", T3, "-1"),
    ),
    Case(  # Scores: 4/6+.8+1, 1+.7+1, 0+.6+1
        "a model that nobody listed passes under its own name when there is room",
        ROOM,
        v05("test5", "no-such-model"),
        Routed(1, "no-such-model"),
        ("no-such-model", "no-such-model", "-1"),
    ),
    Case(  # .6+.8+1, 1+.15+1, 0+.1+1. Upstream: pod 1, whose queue is shortest
        "a model without targets keeps its name, and goes where the scores say, unlike upstream",
        PARTLY,
        v05("test6", "direct-model"),
        Routed(0, "direct-model"),
        ("direct-model", "direct-model", "1"),
    ),
    Case(
        "a body that is no JSON",
        (Server(0, 0.2),),
        plain(b"no healthy upstream"),
        Refused(400, "the request body is not valid JSON"),
    ),
)


@pytest.mark.parametrize("case", V05, ids=lambda case: case.name)
async def test_a_case_of_v0_5_over_inference_models_and_a_pool_of_v1alpha2(older_cluster: Cluster, case: Case) -> None:
    namespace = await older_cluster.namespace()
    await namespace.older_pool(8000)
    for model, criticality, targets in MODELS:
        await namespace.model(f"{model}-object", model, criticality, dict.fromkeys(targets))
    if case.counted is not None and case.counted[0] in (name for name, _, targets in MODELS if targets):
        case = msgspec.structs.replace(case, rewritten=(f"{case.counted[0]}-object", *case.counted[:2]))
    async with inside(older_cluster, namespace, NamedPool(namespace.name, POOL, OLD_POOL), 0, 5) as harness:
        await check(harness, case)


async def test_a_request_without_a_model_is_not_sheddable_where_models_are_listed(older_cluster: Cluster) -> None:
    """A client that asks which models there are is served by a full pool, too."""
    namespace = await older_cluster.namespace()
    await namespace.older_pool(8000)
    await namespace.model("m", "sql-lora", "Critical", {})
    async with inside(older_cluster, namespace, NamedPool(namespace.name, POOL, OLD_POOL), 0, 1) as harness:
        await harness.be(SATURATED)
        (reply,) = await harness.ask(messages(bodyless()(harness)))
        assert reply.request_headers.response.header_mutation.set_headers


async def test_of_v0_1_the_first_case(older_cluster: Cluster) -> None:
    """The metadata's shape and the header target-pod are gone; where it goes is not."""
    namespace = await older_cluster.namespace()
    await namespace.older_pool(8000)
    await namespace.model("m", "sql-lora", "Critical", {T2: None})
    rewritten = ("m", "sql-lora", T2)
    servers = (Server(0, 0.2, ("foo", "bar")), Server(0, 0.1, ("foo", T2)), Server(10, 0.2, ("foo", "bar")))
    case = Case("v0.1", servers, v05("hello", "sql-lora"), Routed(1, T2), ("sql-lora", T2, "1"), rewritten)
    async with inside(older_cluster, namespace, NamedPool(namespace.name, POOL, OLD_POOL), 0, 1) as harness:
        await check(harness, case)


# -- what an objective decides -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("priority", "status"), [(-1, 429), (0, 0), (None, 0), (2, 0)])
async def test_only_a_priority_below_0_is_refused_when_all_are_saturated(
    cluster: Cluster, priority: int | None, status: int
) -> None:
    namespace = await cluster.namespace()
    await namespace.pool(8000)
    await namespace.objective(OBJECTIVES, "some", priority)
    async with inside(cluster, namespace, NamedPool(namespace.name, POOL), 1, 0) as harness:
        await harness.be(SATURATED)
        replies = await harness.ask(messages(llm("hello", "m", "m", objective="some")(harness)))
        assert replies[0].immediate_response.status.code == status
