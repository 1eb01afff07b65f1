"""What the watched objects say together: which endpoints there are, and which policies hold.

In: objects of each kind as lists and watches bring them, and which kinds there are. Out: endpoints for the table,
`Policies` for the picker, conditions to be written, and notes for the operator.
Rules here:
- What comes out depends on the objects that there are now and on nothing else, so that neither the order of events
  nor a list that is read again changes it.
- A pod's endpoints are worked out when the pod changes; the rest when somebody asks and something changed. Nothing
  changed: the same object is returned, so that whoever follows compares one reference.
- A pool that is gone has no endpoints, and takes no policy with it.
- Of two pods with one address the younger has it: an address is given away again only after its pod has ended.
- Where both groups of a kind are installed, the new one's objects count, and the other's are ignored and noted.
- Rules for one model come before those for all, then the oldest object's, then by namespace and name, then in the
  object's own order. Of two InferenceModels for one name the older has it; the younger is told so in its status.
- Where there are InferenceModels, a model that neither they nor a rewrite name is as one that is Sheddable.
- What is for another pool is no concern of this one, and is passed over in silence.
Rejected: a status for objects that cannot be read or are ignored: a picker that does not use an object leaves its
status to one that does.
Source: Gateway API Inference Extension (precedence, `ModelNameInUse`, unlisted models in v0.5, where they were a
404 before), llm-d router (groups). That a deleted pool keeps its policies, that ties are broken, and that anything is
noted, is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Final, TypeVar

import msgspec

from epp.discovery.kube.objects import (
    PRIORITIES,
    Condition,
    Key,
    Kind,
    Model,
    Note,
    Objective,
    Pod,
    Policy,
    Pool,
    Reading,
    Rewrite,
    endpoints_of,
    key_of,
    note,
    read,
)
from epp.endpoints.table import Endpoint
from epp.flow.policies import Policies, Rule

POOLS: Final = (Kind.POOL, Kind.LEGACY_POOL)
OBJECTIVES: Final = (Kind.OBJECTIVE, Kind.LEGACY_OBJECTIVE)
REWRITES: Final = (Kind.REWRITE, Kind.LEGACY_REWRITE)
"""Each the new group's kind, then the legacy one."""
LONGEST_MESSAGE: Final = 32_768
"""Characters of a condition's message, as the API server allows."""

PolicyT = TypeVar("PolicyT", bound=Policy)


class NamedPool(msgspec.Struct, frozen=True):
    """Serve the pool of this name (`--pool-name`, `--pool-namespace`, `--pool-group`)."""

    namespace: str
    name: str
    kinds: tuple[Kind, ...] = (Kind.POOL,)
    """Where to look for it; the first that has it counts."""


class SelectedPods(msgspec.Struct, frozen=True):
    """Serve pods without a pool (`--endpoint-selector`, `--endpoint-target-ports`)."""

    namespace: str
    name: str
    """What policies refer to as their pool."""
    pool: Pool


class Status(msgspec.Struct, frozen=True):
    """A condition that an object should have and has not."""

    kind: Kind
    namespace: str
    name: str
    condition: Condition


class ClusterView:
    """The objects that concern one pool. Objects of other namespaces, and other pools, are passed over."""

    def __init__(self, scope: NamedPool | SelectedPods) -> None:
        self._scope = scope
        self._present: frozenset[Kind] = frozenset((Kind.POD,))
        self._listed: set[Kind] = set()
        """Kinds of which a whole list has been told."""
        self._readings: dict[Kind, dict[Key, Reading | Note]] = {kind: {} for kind in Kind}
        self._pool: Pool | None = None
        self._by_pod: dict[Key, tuple[Endpoint, ...]] = {}
        self._notes_by_pod: dict[Key, tuple[Note, ...]] = {}
        self._endpoints: tuple[Endpoint, ...] | None = ()
        """This and the next three: None when they must be worked out again."""
        self._twins: tuple[Note, ...] = ()
        self._verdict: Verdict | None = None
        self._notes: tuple[Note, ...] | None = None
        self._find_pool()

    def __repr__(self) -> str:
        pool = "known" if self._pool is not None else "unknown"
        return (
            f"<ClusterView {self._scope.namespace}/{self._scope.name} [Pool: {pool} | "
            f"Pods: {len(self._readings[Kind.POD])} | Endpoints: {len(self.endpoints())}]>"
        )

    # -- what is told ---------------------------------------------------------------------------------------------

    def set_present(self, kinds: Collection[Kind]) -> None:
        """Which kinds there are, and may be watched. Pods always are; at first nothing else is.

        The objects of a kind that is no longer among them are gone.
        """
        present = frozenset((*kinds, Kind.POD))
        for kind in self._present - present:
            self.replace(kind, ())
            self._listed.discard(kind)
        self._present = present
        self._verdict = self._notes = None

    def replace(self, kind: Kind, objects: Iterable[object]) -> None:
        """These are all the objects of a kind, as a list tells. Ignored for a kind that is not present."""
        if kind not in self._present:
            return
        self._listed.add(kind)
        objects = list(objects)
        for key in self._readings[kind].keys() - set(map(key_of, objects)):
            self._take(kind, key, None)
        for raw in objects:
            self._put(kind, raw)
        self._settle(kind)

    def put(self, kind: Kind, raw: object) -> None:
        """An object came or changed. Ignored for a kind that is not present."""
        if kind in self._present:
            self._put(kind, raw)
            self._settle(kind)

    def drop(self, kind: Kind, raw: object) -> None:
        """An object is gone; of `raw` only namespace and name are looked at."""
        self._take(kind, key_of(raw), None)
        self._settle(kind)

    # -- what it means --------------------------------------------------------------------------------------------

    @property
    def is_synced(self) -> bool:
        """The pool is known, and every kind that there is has been listed: what is decided now is not premature."""
        return self._pool is not None and self._present <= self._listed

    @property
    def pool(self) -> Pool | None:
        """The pool as it is now; None: there is none."""
        return self._pool

    def endpoints(self) -> tuple[Endpoint, ...]:
        """What should be listed now, by namespace, name and rank; names and addresses are unique.

        The same tuple for as long as nothing changed.
        """
        if self._endpoints is None:
            self._list_endpoints()
        return self._endpoints or ()

    def policies(self) -> Policies:
        """Objectives, and rules in order of precedence. The same value for as long as nothing changed."""
        return self._judge().policies

    def statuses(self) -> tuple[Status, ...]:
        """Conditions that should be written, since the objects, as last told, do not have them."""
        return self._judge().statuses

    def notes(self) -> tuple[Note, ...]:
        """What an operator should know now, in order. What is true of many objects is one note."""
        if self._notes is None:
            self.endpoints()
            unread = (found for of in self._readings.values() for found in of.values() if isinstance(found, Note))
            of_pods = (said for notes in self._notes_by_pod.values() for said in notes)
            self._notes = _gather((*unread, *of_pods, *self._twins, *self._ignored(), *self._judge().notes))
        return self._notes

    # -- inside ---------------------------------------------------------------------------------------------------

    def _put(self, kind: Kind, raw: object) -> None:
        key = key_of(raw)
        if key[0] == self._scope.namespace and (kind not in POOLS or key[1] == self._scope.name):
            self._take(kind, key, read(kind, raw))

    def _take(self, kind: Kind, key: Key, reading: Reading | Note | None) -> None:
        """Keep what an object says now; None: it is gone."""
        readings = self._readings[kind]
        if readings.get(key) == reading:
            return
        if reading is None:
            del readings[key]
        else:
            readings[key] = reading
        self._notes = None
        if kind is Kind.POD:
            self._read_pod(key, reading)
        elif kind not in POOLS:
            self._verdict = None

    def _settle(self, kind: Kind) -> None:
        if kind in POOLS:
            self._find_pool()

    def _find_pool(self) -> None:
        """See which pool it is now; all pods are looked at again when it is another."""
        pool = self._scope.pool if isinstance(self._scope, SelectedPods) else self._named(self._scope)
        if pool == self._pool:
            return
        self._pool, self._notes = pool, None
        for key, pod in self._readings[Kind.POD].items():
            self._read_pod(key, pod)

    def _named(self, scope: NamedPool) -> Pool | None:
        key = scope.namespace, scope.name
        found = (self._readings[kind].get(key) for kind in scope.kinds)
        return next((pool for pool in found if isinstance(pool, Pool)), None)

    def _read_pod(self, key: Key, pod: Reading | Note | None) -> None:
        endpoints: tuple[Endpoint, ...] = ()
        notes: tuple[Note, ...] = ()
        if isinstance(pod, Pod) and self._pool is not None:
            endpoints, notes = endpoints_of(pod, self._pool)
        if self._by_pod.get(key, ()) != endpoints:
            self._by_pod[key] = endpoints
            self._endpoints = None
        if not endpoints:
            self._by_pod.pop(key, None)
        self._notes_by_pod[key] = notes
        if not notes:
            del self._notes_by_pod[key]

    def _list_endpoints(self) -> None:
        keys = sorted(self._by_pod)
        listed = tuple(endpoint for key in keys for endpoint in self._by_pod[key])
        if len({endpoint.address for endpoint in listed}) == len(listed):  # nearly always, and cheaper by half
            self._endpoints, self._twins = listed, ()
            return
        holders: dict[str, Key] = {}
        for key in keys:
            for endpoint in self._by_pod[key]:
                holder = holders.setdefault(endpoint.address, key)
                if holder is not key:
                    holders[endpoint.address] = max(holder, key, key=self._created)
        found = [(key, endpoint) for key in keys for endpoint in self._by_pod[key]]
        self._endpoints = tuple(endpoint for key, endpoint in found if holders[endpoint.address] is key)
        self._twins = tuple(
            note(Kind.POD, key, "status.podIP", f"{address} is that of the younger pod {younger[1]}; left out here")
            for key, address in ((key, endpoint.address) for key, endpoint in found)
            if (younger := holders[address]) is not key
        )

    def _created(self, key: Key) -> tuple[str, Key]:
        pod = self._readings[Kind.POD][key]
        return (pod.created if isinstance(pod, Pod) else ""), key

    def _judge(self) -> Verdict:
        if self._verdict is None:
            objectives = self._ours(self._preferred(OBJECTIVES), Objective)
            rewrites = self._ours(self._preferred(REWRITES), Rewrite)
            self._verdict = judge(objectives, rewrites, self._ours(Kind.MODEL, Model))
        return self._verdict

    def _preferred(self, kinds: tuple[Kind, Kind]) -> Kind:
        return kinds[0] if kinds[0] in self._present else kinds[1]

    def _ours(self, kind: Kind, form: type[PolicyT]) -> list[PolicyT]:
        """The policies of a kind that are for this pool, the oldest first."""
        found = (reading for reading in self._readings[kind].values() if isinstance(reading, form))
        return sorted((policy for policy in found if policy.pool == self._scope.name), key=lambda policy: policy.age)

    def _ignored(self) -> Iterator[Note]:
        """Objects of a legacy group beside the new one."""
        told = "ignored, since {} is installed; move it there"
        for new, old in (OBJECTIVES, REWRITES):
            if new in self._present:
                for policy in self._ours(old, Policy):
                    yield note(old, policy.key, "apiVersion", told.format(new.group))
        key = self._scope.namespace, self._scope.name
        kinds = self._scope.kinds if isinstance(self._scope, NamedPool) else ()
        holders = [kind for kind in kinds if isinstance(self._readings[kind].get(key), Pool)]
        for kind in holders[1:]:
            yield note(kind, key, "apiVersion", f"ignored, since {holders[0].group} has a pool of this name")


class Verdict(msgspec.Struct, frozen=True):
    """What policies come to together."""

    policies: Policies
    statuses: tuple[Status, ...]
    notes: tuple[Note, ...]


class Claim(msgspec.Struct, frozen=True):
    """A rule and who makes it."""

    rule: Rule
    policy: Policy
    path: str
    """Where in the policy."""


def judge(objectives: list[Objective], rewrites: list[Rewrite], models: list[Model]) -> Verdict:
    """What the policies of one pool come to, each list with the oldest first."""
    names: dict[str, Model] = {}
    for model in models:
        names.setdefault(model.model, model)
    claims = sorted(
        (*map(_claim, names.values()), *(claim for rewrite in rewrites for claim in _claims(rewrite))),
        key=lambda claim: (claim.rule.model is None, claim.policy.age),
    )
    policies: tuple[Policy, ...] = (*objectives, *rewrites, *names.values())
    notes = [*_shadowed(claims), *(note(each.kind, each.key, *said) for each in policies for said in each.notes)]
    said: dict[tuple[str, str], list[str]] = {}
    for each in notes:
        said.setdefault((each.kind, each.name), []).append(f"{each.path} {each.message}")
    conditions: list[tuple[Policy, Condition]] = []
    for policy in policies:
        message = "; ".join(said.get((policy.kind.title, f"{policy.namespace}/{policy.name}"), ()))
        conditions.append((policy, _condition(policy, "True", "Accepted", message[:LONGEST_MESSAGE])))
    for model in models:
        if (winner := names[model.model]) is not model:
            told = f"{winner.source}, which is older, has the model name {model.model!r}"
            conditions.append((model, _condition(model, "False", "ModelNameInUse", told)))
            notes.append(note(model.kind, model.key, "spec.modelName", told))
    return Verdict(
        Policies(
            {objective.name: objective.priority for objective in objectives},
            tuple(each.rule for each in claims),
            PRIORITIES["Sheddable"] if names else 0,
        ),
        tuple(
            Status(policy.kind, policy.namespace, policy.name, condition)
            for policy, condition in conditions
            if condition not in policy.conditions
        ),
        tuple(notes),
    )


def _claim(model: Model) -> Claim:
    return Claim(Rule(model.model, model.targets, model.priority, model.source), model, "spec.targetModels")


def _claims(rewrite: Rewrite) -> Iterator[Claim]:
    for index, rule in enumerate(rewrite.rules):
        for model in rule.models or (None,):
            source = f"{rewrite.source} rules[{index}]"
            yield Claim(Rule(model, rule.targets, source=source), rewrite, f"spec.rules[{index}]")


def _shadowed(claims: list[Claim]) -> Iterator[Note]:
    """Rules that never rewrite anything, since one before them has the same model. Claims in order of precedence."""
    first: dict[str | None, Claim] = {}
    for claim in claims:
        if claim.rule.targets and (before := first.setdefault(claim.rule.model, claim)) is not claim:
            what = "any model" if claim.rule.model is None else f"model {claim.rule.model!r}"
            yield note(
                claim.policy.kind,
                claim.policy.key,
                claim.path,
                f"has no effect on {what}: {before.rule.source} comes first",
            )


def _condition(policy: Policy, status: str, reason: str, message: str) -> Condition:
    """The condition Accepted. It keeps its time of transition for as long as its status is the same."""
    had = next((each for each in policy.conditions if each.type == "Accepted" and each.status == status), None)
    since = had.last_transition_time if had is not None else None
    return Condition("Accepted", status, reason, message, policy.generation, since)


def _gather(notes: Iterable[Note]) -> tuple[Note, ...]:
    """One note of those that say the same of several objects."""
    alike: dict[tuple[str, str, str], set[str]] = {}
    for each in notes:
        alike.setdefault((each.kind, each.path, each.message), set()).add(each.name)
    return tuple(
        sorted(Note(kind, min(names), path, message, len(names) - 1) for (kind, path, message), names in alike.items())
    )
