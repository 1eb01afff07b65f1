"""What Kubernetes' objects say to a picker: raw JSON, as a list or a watch gives it, to typed readings.

In: one object as decoded JSON, and its kind. Out: a `Reading`, or a `Note` that says what is wrong with it; of a pod
its endpoints.
Rules here:
- Nothing that an object may hold raises. An object that cannot be read is left out whole, since half of its rules
  would route where nobody asked; every other object goes on.
- Only what the picker needs is read, so that a field that is new or odd elsewhere in an object harms nothing.
- A pod has one address, the primary `podIP` (Kubernetes writes the first of `podIPs` there, of the family that the
  cluster prefers). The second address of a dual stack pod would be the same rank once more, with counts of its own.
- An endpoint is one target port of one pod, and its rank is the port's place in the pool's list, whichever others are
  live. It has the pod's labels: role, engine and topology are read from there, as from a file's.
- A pool is referred to by name. The group of a reference is not compared, as long as it is one that InferencePool has
  had: API servers fill in a default, which would tie every InferenceModel to the older group for ever.
Rejected: the client library's model classes; they hold every field of 1,000 pods and take longer to make.
Source: Gateway API Inference Extension v0.1 to v1.5, llm-d router 0.9 (`apix/`, `datastore`, `controller`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from epp.endpoints.selector import Selector, select_equal
from epp.endpoints.table import Endpoint, host_text
from epp.errors import ConfigError
from epp.flow.policies import Target

LEGACY_GROUP: Final = "inference.networking.x-k8s.io"
POOL_GROUP: Final = "inference.networking.k8s.io"
ACTIVE_PORTS: Final = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports")
"""Annotations that name the live ports of a pod; the first that is there counts."""
PRIORITIES: Final = {"Critical": 1, "Standard": 0, "Sheddable": -1}
"""Priority of an InferenceModel's criticality: the order that the move to InferenceObjective prescribes, in the
smallest numbers that have it."""


class Kind(enum.Enum):
    """Resources that a picker watches: group, versions (preferred first), plural, kind."""

    POD = ("", ("v1",), "pods", "Pod")
    POOL = (POOL_GROUP, ("v1",), "inferencepools", "InferencePool")
    LEGACY_POOL = (LEGACY_GROUP, ("v1alpha2", "v1alpha1"), "inferencepools", "InferencePool")
    OBJECTIVE = ("llm-d.ai", ("v1alpha2",), "inferenceobjectives", "InferenceObjective")
    LEGACY_OBJECTIVE = (LEGACY_GROUP, ("v1alpha2",), "inferenceobjectives", "InferenceObjective")
    REWRITE = ("llm-d.ai", ("v1alpha2",), "inferencemodelrewrites", "InferenceModelRewrite")
    LEGACY_REWRITE = (LEGACY_GROUP, ("v1alpha2",), "inferencemodelrewrites", "InferenceModelRewrite")
    MODEL = (LEGACY_GROUP, ("v1alpha2", "v1alpha1"), "inferencemodels", "InferenceModel")

    def __init__(self, group: str, versions: tuple[str, ...], plural: str, title: str) -> None:
        self.group = group
        self.versions = versions
        self.plural = plural
        self.title = title


Key = tuple[str, str]
"""Namespace and name."""


class Note(msgspec.Struct, frozen=True, order=True):
    """Something that an operator should know of an object."""

    kind: str
    """As "InferencePool"."""
    name: str
    """"<namespace>/<name>"; of several objects the first in order."""
    path: str
    """Where in the object, as `spec.targetPorts[0].number`; empty: the whole of it."""
    message: str
    others: int = 0
    """Further objects of which the same is to be said."""

    def __str__(self) -> str:
        who = f"{self.kind} {self.name}" + (f" (and {self.others} more)" if self.others else "")
        return ": ".join(part for part in (who, self.path, self.message) if part)


class Pool(msgspec.Struct, frozen=True):
    """Which pods are the pool's, and on which ports they serve."""

    selector: Selector
    ports: tuple[int, ...]
    """1 to 8, each once; the place of a port is its rank."""
    app_protocol: str = "http"
    """Between gateway and model server: "http" or "kubernetes.io/h2c"."""


class Pod(msgspec.Struct, frozen=True):
    """A pod, as far as it can be an endpoint."""

    namespace: str
    name: str
    created: str
    labels: dict[str, str]
    host: str
    """Its address as in `Endpoint.address`; empty: it has none yet."""
    is_ready: bool
    """Condition Ready is True, and nobody has asked for its deletion."""
    active_ports: tuple[str, str] | None
    """Name and text of the annotation; None: every target port is live."""
    declared: tuple[int, ...]
    """TCP ports of its containers, sorted."""
    node: str = ""
    """Name of the node that it runs on; empty: it runs nowhere yet."""
    node_host: str = ""
    """That node's address as in `Endpoint.node_address`."""


class Condition(msgspec.Struct, frozen=True, rename="camel"):
    """A condition of an object's status."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    observed_generation: int | None = None
    last_transition_time: str | None = None
    """RFC 3339. None in a condition that is to be written: it is the time of writing."""


class Policy(msgspec.Struct, frozen=True):
    """What objectives, rewrites and models have in common."""

    kind: Kind
    namespace: str
    name: str
    created: str
    """RFC 3339 in UTC to the second, so that texts sort as times."""
    generation: int | None
    pool: str | None
    """Name of the pool that it is for; None: a reference to something that is no InferencePool."""
    conditions: tuple[Condition, ...]
    notes: tuple[tuple[str, str], ...]
    """What is odd in it: where, and what."""

    @property
    def key(self) -> Key:
        return self.namespace, self.name

    @property
    def source(self) -> str:
        """As "InferenceModel default/chat"."""
        return f"{self.kind.title} {self.namespace}/{self.name}"

    @property
    def age(self) -> tuple[bool, str, str, str]:
        """Sorts the oldest first, then by namespace and name. Without a creation time it is the youngest."""
        return not self.created, self.created, self.namespace, self.name


class Objective(Policy, frozen=True):
    """An InferenceObjective: requests that name it have this priority."""

    priority: int


class RewriteRule(msgspec.Struct, frozen=True):
    """One rule of an InferenceModelRewrite."""

    models: tuple[str, ...]
    """Each once; none: every model."""
    targets: tuple[Target, ...]


class Rewrite(Policy, frozen=True):
    """An InferenceModelRewrite."""

    rules: tuple[RewriteRule, ...]


class Model(Policy, frozen=True):
    """An InferenceModel: a rewrite of one model name, and the priority of requests for it."""

    model: str
    priority: int
    targets: tuple[Target, ...]
    """None: the name is not rewritten."""


Reading = Pool | Pod | Objective | Rewrite | Model


def read(kind: Kind, raw: object) -> Reading | Note:
    """Read an object of a kind. Raises nothing: what cannot be read becomes a note."""
    try:
        return _READERS[kind](kind, raw)
    except msgspec.ValidationError as error:
        message, _, path = str(error).rstrip("`").partition(" - at `")
        return note(kind, key_of(raw), path.removeprefix("$").removeprefix("."), _lower(message))
    except UnicodeEncodeError:
        return note(kind, key_of(raw), "", "expected text in Unicode, found half of a surrogate pair")
    except ConfigError as error:
        return note(kind, key_of(raw), error.path, error.message)


def key_of(raw: object) -> Key:
    """Namespace and name of any object; empty where it has none."""
    metadata = raw.get("metadata") if isinstance(raw, Mapping) else None
    found = [metadata.get(field) if isinstance(metadata, Mapping) else None for field in ("namespace", "name")]
    namespace, name = (part if isinstance(part, str) else "" for part in found)
    return namespace, name


def note(kind: Kind, key: Key, path: str, message: str) -> Note:
    return Note(kind.title, f"{key[0]}/{key[1]}", path, message)


def endpoints_of(pod: Pod, pool: Pool) -> tuple[tuple[Endpoint, ...], tuple[Note, ...]]:
    """The endpoints that a pod gives a pool now, by rank, and what is to be said of it.

    None of either for a pod that the pool does not select, that is not ready, or that is being deleted.
    """
    if not pod.is_ready or not pod.host or not pool.selector.matches(pod.labels):
        return (), ()
    live, notes = _live_ports(pod, pool.ports)
    unknown = [str(port) for port in pod.declared if port not in pool.ports]
    if unknown:
        notes.append(
            ("spec.containers[].ports", f"no target port of the pool, so never routed to: {', '.join(unknown)}")
        )
    endpoints = tuple(
        Endpoint(
            f"{pod.namespace}/{pod.name}-rank-{rank}",
            f"{pod.host}:{port}",
            pod.labels,
            node=pod.node,
            node_address=pod.node_host,
        )
        for rank, port in enumerate(pool.ports)
        if port in live
    )
    return endpoints, tuple(note(Kind.POD, (pod.namespace, pod.name), *said) for said in notes)


def _live_ports(pod: Pod, ports: tuple[int, ...]) -> tuple[Sequence[int], list[tuple[str, str]]]:
    """Target ports that are live. An entry that is none of them is left out and noted."""
    if pod.active_ports is None:
        return ports, []
    name, text = pod.active_ports
    entries = [entry.strip() for entry in text.split(",")]
    known = {str(port): port for port in ports}
    odd = [entry for entry in entries if entry not in known and entry]
    live = [known[entry] for entry in entries if entry in known]
    path = f"metadata.annotations[{name}]"
    expected = f"expected target ports of the pool ({', '.join(known)}) with commas between them"
    notes = [(path, f"{expected}, found {', '.join(map(repr, odd))}")] if odd else []
    if not live:
        notes.append((path, "names no target port of the pool, so that the pod gets no requests"))
    return live, notes


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


# -- the JSON, as far as it is read -----------------------------------------------------------------------------------

_Text = Annotated[str, Meta(min_length=1)]
_Port = Annotated[int, Meta(ge=1, le=65535)]
_Weight = Annotated[int, Meta(ge=0, le=1_000_000)]
_Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
_MatchLabels = Annotated[dict[str, str], Meta(min_length=1)]


class _Json(msgspec.Struct, frozen=True, rename="camel"):
    """Fields as Kubernetes spells them. What may be left out may also be null."""


class _Meta(_Json, frozen=True):
    name: _Text
    namespace: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    generation: int | None = None


class _LabelSelector(_Json, frozen=True):
    match_labels: _MatchLabels


class _TargetPort(_Json, frozen=True):
    number: _Port


class _PoolSpec(_Json, frozen=True):
    selector: _LabelSelector
    target_ports: Annotated[list[_TargetPort], Meta(min_length=1, max_length=8)]
    app_protocol: str | None = None


class _PoolObject(_Json, frozen=True):
    spec: _PoolSpec


class _LegacyPoolSpec(_Json, frozen=True):
    selector: _MatchLabels
    target_port_number: _Port


class _LegacyPoolObject(_Json, frozen=True):
    spec: _LegacyPoolSpec


class _ContainerPort(_Json, frozen=True):
    container_port: int
    protocol: str | None = None


class _Container(_Json, frozen=True):
    ports: list[_ContainerPort] | None = None


class _PodSpec(_Json, frozen=True):
    node_name: str | None = None
    containers: list[_Container] | None = None


class _PodCondition(_Json, frozen=True):
    type: str
    status: str


class _PodStatus(_Json, frozen=True):
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    host_ip: str | None = msgspec.field(default=None, name="hostIP")
    conditions: list[_PodCondition] | None = None


class _PodObject(_Json, frozen=True):
    metadata: _Meta
    spec: _PodSpec = _PodSpec()
    status: _PodStatus = _PodStatus()


class _PoolRef(_Json, frozen=True):
    name: _Text
    group: str | None = None
    kind: str | None = None


class _Status(_Json, frozen=True):
    conditions: list[Condition] | None = None


class _ObjectiveSpec(_Json, frozen=True):
    pool_ref: _PoolRef
    priority: _Int32 | None = None


class _ObjectiveObject(_Json, frozen=True):
    metadata: _Meta
    spec: _ObjectiveSpec
    status: _Status | None = None


class _ModelMatch(_Json, frozen=True):
    value: _Text
    type: Literal["Exact"] | None = None


class _Match(_Json, frozen=True):
    model: _ModelMatch


class _RewriteTarget(_Json, frozen=True):
    model_rewrite: _Text
    weight: _Weight | None = None


class _Rule(_Json, frozen=True):
    targets: Annotated[list[_RewriteTarget], Meta(min_length=1)]
    matches: list[_Match] | None = None


class _RewriteSpec(_Json, frozen=True):
    pool_ref: _PoolRef
    rules: list[_Rule]


class _RewriteObject(_Json, frozen=True):
    metadata: _Meta
    spec: _RewriteSpec
    status: _Status | None = None


class _TargetModel(_Json, frozen=True):
    name: _Text
    weight: _Weight | None = None


class _ModelSpec(_Json, frozen=True):
    model_name: _Text
    pool_ref: _PoolRef
    criticality: Literal["Critical", "Standard", "Sheddable"] | None = None
    target_models: list[_TargetModel] | None = None


class _ModelObject(_Json, frozen=True):
    metadata: _Meta
    spec: _ModelSpec
    status: _Status | None = None


# -- from JSON to readings --------------------------------------------------------------------------------------------


def _read_pool(_: Kind, raw: object) -> Pool:
    spec = msgspec.convert(raw, _PoolObject).spec
    ports = tuple(port.number for port in spec.target_ports)
    if len(set(ports)) < len(ports):
        raise ConfigError(f"expected each port once, found {', '.join(map(str, ports))}", path="spec.targetPorts")
    return Pool(select_equal(spec.selector.match_labels), ports, spec.app_protocol or "http")


def _read_legacy_pool(_: Kind, raw: object) -> Pool:
    spec = msgspec.convert(raw, _LegacyPoolObject).spec
    return Pool(select_equal(spec.selector), (spec.target_port_number,))


def _read_pod(_: Kind, raw: object) -> Pod:
    pod = msgspec.convert(raw, _PodObject)
    meta, conditions = pod.metadata, pod.status.conditions or ()
    annotations = meta.annotations or {}
    ports = (port for container in pod.spec.containers or () for port in container.ports or ())
    return Pod(
        namespace=meta.namespace,
        name=meta.name,
        created=meta.creation_timestamp or "",
        labels=meta.labels or {},
        host=_host(pod.status.pod_ip),
        is_ready=meta.deletion_timestamp is None
        and any(condition.type == "Ready" and condition.status == "True" for condition in conditions),
        active_ports=next(((name, annotations[name]) for name in ACTIVE_PORTS if name in annotations), None),
        declared=tuple(sorted({port.container_port for port in ports if port.protocol in (None, "TCP")})),
        node=pod.spec.node_name or "",
        node_host=_node_host(pod.status.host_ip),
    )


def _node_host(ip: str | None) -> str:
    """Empty where it is none: nothing that serves requests hangs on it."""
    try:
        return host_text(ip) if ip else ""
    except ValueError:
        return ""


def _host(ip: str | None) -> str:
    try:
        return host_text(ip) if ip else ""
    except ValueError:
        raise ConfigError(f"expected an IP address, found {ip!r}", path="status.podIP") from None


def _read_objective(kind: Kind, raw: object) -> Objective:
    found = msgspec.convert(raw, _ObjectiveObject)
    return Objective(*_common(kind, found.metadata, found.spec.pool_ref, found.status), found.spec.priority or 0)


def _read_rewrite(kind: Kind, raw: object) -> Rewrite:
    found = msgspec.convert(raw, _RewriteObject)
    rules: list[RewriteRule] = []
    notes: list[tuple[str, str]] = []
    for index, rule in enumerate(found.spec.rules):
        models = dict.fromkeys(match.model.value for match in rule.matches or ())
        weighted = [(target.model_rewrite, target.weight) for target in rule.targets]
        rules.append(RewriteRule(tuple(models), _targets(weighted)))
        notes += _unweighted(weighted, f"spec.rules[{index}].targets")
    return Rewrite(*_common(kind, found.metadata, found.spec.pool_ref, found.status, notes), tuple(rules))


def _read_model(kind: Kind, raw: object) -> Model:
    found = msgspec.convert(raw, _ModelObject)
    spec = found.spec
    weighted = [(target.name, target.weight) for target in spec.target_models or ()]
    notes = _unweighted(weighted, "spec.targetModels")
    common = _common(kind, found.metadata, spec.pool_ref, found.status, notes)
    return Model(*common, spec.model_name, PRIORITIES[spec.criticality or "Standard"], _targets(weighted))


_Weighted = Sequence[tuple[str, int | None]]


def _targets(weighted: _Weighted) -> tuple[Target, ...]:
    return tuple(Target(model, weight or 0) for model, weight in weighted)


def _unweighted(weighted: _Weighted, path: str) -> list[tuple[str, str]]:
    """Which targets are never chosen because others have a weight and they have none."""
    if not any(weight for _, weight in weighted):
        return []
    return [
        (f"{path}[{index}].weight", "0 or missing beside others that have one, so that this target is never chosen")
        for index, (_, weight) in enumerate(weighted)
        if not weight
    ]


def _common(
    kind: Kind, meta: _Meta, pool: _PoolRef, status: _Status | None, notes: Sequence[tuple[str, str]] = ()
) -> tuple[Kind, str, str, str, int | None, str | None, tuple[Condition, ...], tuple[tuple[str, str], ...]]:
    """The fields of `Policy`, in their order."""
    is_pool = pool.kind in (None, "", "InferencePool") and pool.group in (None, "", POOL_GROUP, LEGACY_GROUP)
    conditions = tuple((status and status.conditions) or ())
    created, name = meta.creation_timestamp or "", pool.name if is_pool else None
    return kind, meta.namespace, meta.name, created, meta.generation, name, conditions, tuple(notes)


_READERS: Final[dict[Kind, Callable[[Kind, Any], Reading]]] = {
    Kind.POD: _read_pod,
    Kind.POOL: _read_pool,
    Kind.LEGACY_POOL: _read_legacy_pool,
    Kind.OBJECTIVE: _read_objective,
    Kind.LEGACY_OBJECTIVE: _read_objective,
    Kind.REWRITE: _read_rewrite,
    Kind.LEGACY_REWRITE: _read_rewrite,
    Kind.MODEL: _read_model,
}
