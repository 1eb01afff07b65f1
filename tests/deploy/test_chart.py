"""What the chart renders is sound before any cluster sees it: for the picker's own parsers, and by its own rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from epp.config.load import load_file
from epp.discovery.kube.objects import Kind
from epp.discovery.kube.view import NamedPool, SelectedPods
from epp.scheduling.catalogue import catalogue
from epp.settings import read_candidate, read_scope, read_settings
from scripts import tools
from tests.deploy.charts import CHART, LABELLED, MATRIX, ROOT, SELECTED, Object, Refused, Rendered, helm, render

EVERY = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
LONGEST = "a-release-with-a-name-of-fifty-three-characters-and-no"
"""The longest that helm takes is one less."""


def test_it_has_no_fault_that_helm_finds() -> None:
    version = ("--kube-version", tools.version("kube"))
    sets = [word for value in LABELLED for word in ("--set", value)]
    assert "1 chart(s) linted, 0 chart(s) failed" in helm("lint", "--strict", str(CHART), *version, *sets)
    assert "1 chart(s) linted, 0 chart(s) failed" in helm("lint", "--strict", str(CHART), *version)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("inferenceExtension.replica=2",), "additional properties 'replica' not allowed"),
        (("inferenceExtension.replicas=two",), "got string, want integer"),
        (("inferenceExtension.flags.Pool=x",), "'Pool' does not match"),
        (("inferenceExtension.latencyPredictor.enabled=true",), "/inferenceExtension/latencyPredictor/enabled"),
        (("inferencePool.failureMode=FailClosed",), "'FailOpen', 'FailClose'"),
        (("inferencePool.targetPorts[0].number=70000",), "/inferencePool/targetPorts/0/number"),
        (("inferencePool.apiVersion=inference.networking.k8s.io/v2",), "/inferencePool/apiVersion"),
        (("mode=sidecar",), "'gateway', 'standalone'"),
        (("provider.name=nginx",), "'none', 'istio', 'gke'"),
        (("router.epp.replicas=2",), "additional properties 'router' not allowed"),
        (("inferencePool.modelServers.matchLabels=null",), "modelServers.matchLabels is required"),
        (("inferenceExtension.pluginsConfigFile=mine.yaml",), "there is no mine.yaml"),
        (
            ("inferenceExtension.replicas=2", "inferenceExtension.podDisruptionBudget.enabled=true"),
            "a standby is never ready",
        ),
        (
            (
                "inferencePool.apiVersion=inference.networking.x-k8s.io/v1alpha2",
                "inferencePool.targetPorts[0].number=1",
                "inferencePool.targetPorts[1].number=2",
            ),
            "has one port",
        ),
    ],
)
def test_values_that_cannot_be_meant_are_refused(values: tuple[str, ...], words: str) -> None:
    with pytest.raises(Refused, match=re.escape(words)):
        render(*LABELLED, *values)


def test_without_labels_and_without_a_selector_it_says_what_is_required() -> None:
    with pytest.raises(Refused, match=r"modelServers\.matchLabels is required"):
        render()
    with pytest.raises(Refused, match="endpointSelector is required"):
        render("mode=standalone", "inferenceExtension.endpointsServer.createInferencePool=false")
    with pytest.raises(Refused, match="inferenceObjectives name a pool"):
        render(*SELECTED, "inferenceObjectives[0].name=a", "inferenceObjectives[0].priority=1")


def test_the_args_are_those_of_the_references_chart() -> None:
    """In its order and spelling: llm-d's routerlib chart."""
    assert render(*LABELLED).args == [
        "--pool-name", "llm", "--pool-namespace", "models", "--pool-group", "inference.networking.k8s.io",
        "--zap-encoder", "json", "--config-file", "/config/default-plugins.yaml", "--grpc-health-port", "9003",
        "--v=1", "--tracing=false",
    ]  # fmt: skip
    assert render(*SELECTED, "inferenceExtension.monitoring.prometheus.auth.enabled=false").args == [
        "--endpoint-selector", "app=llm,tier in (gpu)", "--endpoint-target-ports", "8000,8001",
        "--zap-encoder", "json", "--config-file", "/config/default-plugins.yaml", "--grpc-health-port", "9003",
        "--v=1", "--tracing=false", "--metrics-endpoint-auth=false",
    ]  # fmt: skip


@EVERY
def test_the_picker_takes_its_args_and_its_configuration(
    values: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = render(*values)
    flags = rendered.flags
    read_settings(flags)
    monkeypatch.setenv("POD_NAME", rendered.one("Deployment")["metadata"]["name"] + "-75b9d7f5c-x2x4z")
    scope = read_scope(flags)
    if values[: len(SELECTED)] == SELECTED:
        assert isinstance(scope, SelectedPods)
        assert (scope.name, scope.pool.ports) == ("llm-epp", (8000, 8001))
    else:
        group = rendered.one("InferencePool")["apiVersion"].partition("/")[0]
        kinds = {"inference.networking.k8s.io": (Kind.POOL,), "inference.networking.x-k8s.io": (Kind.LEGACY_POOL,)}
        assert scope == NamedPool("models", "llm", kinds[group])
    load_file(str(rendered.write_config(tmp_path)), catalogue(()))


@EVERY
def test_ports_agree_with_flags_and_with_one_another(values: tuple[str, ...]) -> None:
    rendered = render(*values)
    flags, service = rendered.flags, rendered.one("Service")
    ports = {port["name"]: port["containerPort"] for each in rendered.containers for port in each["ports"]}
    assert ports["grpc"] == flags.grpc_port
    assert ports["grpc-health"] == flags.grpc_health_port
    assert ports["metrics"] == flags.metrics_port
    served = {port["name"]: port for port in service["spec"]["ports"]}
    for name, port in served.items():
        assert port.get("targetPort", port["port"]) in {*ports, *ports.values()}, name
    assert served["grpc-ext-proc"]["appProtocol"] == ("http2" if flags.secure_serving else "kubernetes.io/h2c")
    for pool in rendered.all("InferencePool"):
        ref = pool["spec"].get("endpointPickerRef") or pool["spec"]["extensionRef"]
        told = ref["portNumber"] if "portNumber" in ref else ref["port"]["number"]
        assert (ref["name"], told) == (service["metadata"]["name"], served["grpc-ext-proc"]["port"])
    for policy in rendered.all("NetworkPolicy"):
        opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        assert opened == set(ports.values())


@EVERY
def test_probes_ask_for_services_that_the_picker_answers(values: tuple[str, ...]) -> None:
    rendered = render(*values)
    picker = rendered.picker
    assert picker["livenessProbe"]["grpc"] == {"port": rendered.flags.grpc_health_port, "service": "liveness"}
    assert picker["readinessProbe"]["grpc"] == {"port": rendered.flags.grpc_health_port, "service": "readiness"}


@EVERY
def test_every_container_is_confined_and_the_picker_alone_has_a_token(values: tuple[str, ...]) -> None:
    """The profile `restricted` of Kubernetes' pod security standards, and a root that nothing can write."""
    rendered = render(*values)
    security = rendered.pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in rendered.containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
    assert rendered.pod["automountServiceAccountToken"] is False
    with_token = [
        container["name"]
        for container in rendered.containers
        if any(mount["name"] == "api-access" for mount in container["volumeMounts"])
    ]
    assert with_token == ["epp"]


@EVERY
def test_a_pod_has_time_to_drain(values: tuple[str, ...]) -> None:
    rendered = render(*values)
    assert rendered.pod["terminationGracePeriodSeconds"] > read_settings(rendered.flags).drain_timeout


def test_more_than_one_picker_elects_unless_told_otherwise() -> None:
    assert not render(*LABELLED).flags.ha_enable_leader_election
    assert render(*MATRIX["a leader and a standby"]).flags.ha_enable_leader_election
    assert not render(*MATRIX["three that all serve"]).flags.ha_enable_leader_election
    assert render(*MATRIX["an election of one"]).flags.ha_enable_leader_election


@pytest.mark.parametrize(
    ("name", "surge", "unavailable"),
    [
        ("gateway", 1, 0),  # the new one is ready before the old one goes
        ("three that all serve", 1, 0),
        ("a leader and a standby", 1, 1),  # a standby is never ready: helm --wait and Deployments expect one
        ("a leader and two standbys", 1, 2),
    ],
)
def test_an_update_takes_no_picker_away_that_is_needed(name: str, surge: int, unavailable: int) -> None:
    strategy = render(*MATRIX[name]).one("Deployment")["spec"]["strategy"]
    assert strategy == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable},
    }


@EVERY
def test_only_a_picker_that_elects_may_touch_a_lease_and_that_is_its_own(
    values: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = render(*values)
    rules = rendered.one("Role")["rules"]
    given = [(rule.get("resourceNames", []), rule["verbs"]) for rule in rules if rule["resources"] == ["leases"]]
    monkeypatch.setenv("POD_NAME", "llm-epp-75b9d7f5c-x2x4z")
    monkeypatch.setenv("NAMESPACE", "models")
    candidate = read_candidate(rendered.flags, read_scope(rendered.flags))
    if candidate is None:
        assert given == []
    else:
        assert given == [([], ["create"]), ([candidate.lease], ["get", "update"])]


@EVERY
def test_no_right_is_a_wildcard_and_nothing_is_read_that_is_not_needed(values: tuple[str, ...]) -> None:
    rendered = render(*values)
    rules = [rule for kind in ("Role", "ClusterRole") for each in rendered.all(kind) for rule in each["rules"]]
    assert not [rule for rule in rules if "*" in str(rule)]
    resources = {resource for rule in rules for resource in rule.get("resources", ())}
    assert resources <= {
        "pods", "inferencepools", "inferenceobjectives", "inferenceobjectives/status", "inferencemodelrewrites",
        "inferencemodelrewrites/status", "inferencemodels", "inferencemodels/status", "leases", "tokenreviews",
        "subjectaccessreviews",
    }  # fmt: skip
    asks = "tokenreviews" in resources
    assert asks is ("--metrics-endpoint-auth=false" not in rendered.args)


@pytest.mark.parametrize(
    "values", [LABELLED, MATRIX["GKE"], MATRIX["standalone"]], ids=["gateway", "GKE", "standalone"]
)
def test_names_are_short_enough_however_long_the_release_and_the_namespace(values: tuple[str, ...]) -> None:
    rendered = render(*values, name=LONGEST[:53], namespace="n" * 63)
    names = [each["metadata"]["name"] for each in rendered.objects]
    assert max(map(len, names)) <= 63
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) for name in names)
    labels = [label for each in rendered.objects for label in each["metadata"]["labels"].values()]
    assert max(map(len, labels)) <= 63
    with pytest.raises(Refused, match="53"):
        render(*values, name=LONGEST[:54])


def test_releases_of_one_name_in_two_namespaces_share_nothing_in_the_cluster() -> None:
    def everywhere(namespace: str) -> set[tuple[str, str]]:
        objects = render(*MATRIX["monitoring"], namespace=namespace).objects
        return {(each["kind"], each["metadata"]["name"]) for each in objects if "namespace" not in each["metadata"]}

    assert len(everywhere("a")) == 4
    assert not everywhere("a") & everywhere("b")


def test_a_change_of_the_configuration_replaces_the_pods() -> None:
    def annotations(*values: str) -> Object:
        template: Object = render(*LABELLED, *values).one("Deployment")["spec"]["template"]
        found: Object = template["metadata"]["annotations"]
        return found

    custom = "inferenceExtension.pluginsCustomConfig.default-plugins\\.yaml=kind: EndpointPickerConfig"
    assert annotations() != annotations(custom)
    assert annotations() == annotations("inferencePool.failureMode=FailClose")


def test_the_default_configuration_is_the_pickers_own() -> None:
    """As config/picker/default.yaml, which says what the picker does without any."""
    text = render(*LABELLED).one("ConfigMap")["data"]["default-plugins.yaml"]
    own = yaml.safe_load((ROOT / "config" / "picker" / "default.yaml").read_text())
    implied = "approx-prefix-cache-producer"  # declared there to show its parameters
    own["plugins"] = [plugin for plugin in own["plugins"] if plugin["type"] != implied]
    assert yaml.safe_load(text) == own


@pytest.mark.parametrize(("name", "endpoints"), [("gateway", 1), ("standalone", 3)])
def test_only_an_envoy_that_takes_a_list_is_given_one(name: str, endpoints: int) -> None:
    config = yaml.safe_load(render(*MATRIX[name]).one("ConfigMap", "-epp")["data"]["default-plugins.yaml"])
    (picker,) = [plugin for plugin in config["plugins"] if plugin["type"] == "max-score-picker"]
    assert picker["parameters"] == {"maxNumOfEndpoints": endpoints}


def test_envoy_beside_the_picker_is_the_one_that_the_end_to_end_tests_run() -> None:
    """The same as config/envoy/standalone-eds.yaml, but for the listener and the cluster that show the admin page, and
    for how endpoints are waited for: here a pod's readiness hangs on it."""
    told = yaml.safe_load(render(*MATRIX["standalone"]).one("ConfigMap", "-envoy")["data"]["envoy.yaml"])
    own = yaml.safe_load((ROOT / "config" / "envoy" / "standalone-eds.yaml").read_text())
    resources = told["static_resources"]
    assert [each["name"] for each in resources["listeners"]] == ["gateway", "stats"]
    assert [each["name"] for each in resources["clusters"]] == ["admin", "pool", "picker-eds", "picker"]
    del resources["listeners"][1], resources["clusters"][0]
    assert told.pop("node") == {"id": "llm-epp", "cluster": "llm-epp"}
    del own["node"]
    edses = [each["static_resources"]["clusters"][0]["eds_cluster_config"]["eds_config"] for each in (told, own)]
    assert edses[0].pop("initial_fetch_timeout") == "0s"
    assert edses[1].pop("initial_fetch_timeout") == "5s"
    assert told == own


def test_envoy_asks_a_picker_in_plaintext_without_tls() -> None:
    def picker(name: str) -> Object:
        told = yaml.safe_load(render(*MATRIX[name]).one("ConfigMap", "-envoy")["data"]["envoy.yaml"])
        (cluster,) = [each for each in told["static_resources"]["clusters"] if each["name"] == "picker"]
        found: Object = cluster
        return found

    secured = picker("standalone")
    assert secured.pop("transport_socket")["name"] == "envoy.transport_sockets.tls"
    assert picker("standalone in plaintext") == secured


def test_istio_is_told_of_the_pickers_certificate() -> None:
    rule = render(*MATRIX["Istio"]).one("DestinationRule")["spec"]
    assert rule == {
        "host": "llm-epp.models.svc.cluster.local",
        "trafficPolicy": {"tls": {"mode": "SIMPLE", "insecureSkipVerify": True, "sni": "epp"}},
    }
    assert not render(*MATRIX["Istio"], "inferenceExtension.flags.secure-serving=false").all("DestinationRule")


def test_the_older_names_of_an_image_count() -> None:
    def image(*values: str) -> str:
        found: str = render(*LABELLED, *values).picker["image"]
        return found

    assert image() == "epp:0.1.0"
    new = ("inferenceExtension.image.registry=r.example.com/llm", "inferenceExtension.image.repository=picker")
    assert image(*new, "inferenceExtension.image.tag=v2") == "r.example.com/llm/picker:v2"
    old = ("inferenceExtension.image.hub=r.example.com/llm", "inferenceExtension.image.name=picker")
    assert image(*old) == "r.example.com/llm/picker:0.1.0"


def test_every_value_is_in_the_schema_and_every_name_of_the_schema_has_a_value() -> None:
    """Older names and what is refused have none."""

    def names(value: object, path: str = "") -> set[str]:
        if not isinstance(value, dict) or not value:
            return {path}
        return {name for key, each in value.items() for name in names(each, f"{path}.{key}")}

    def described(schema: Object, path: str = "") -> set[str]:
        if not schema.get("properties"):
            return {path}
        return {name for key, each in schema["properties"].items() for name in described(each, f"{path}.{key}")}

    values = names(yaml.safe_load((CHART / "values.yaml").read_text()))
    schema = described(yaml.safe_load((CHART / "values.schema.json").read_text()))
    without = {
        ".global",
        ".inferenceExtension.image.hub",
        ".inferenceExtension.image.name",
        ".inferenceExtension.latencyPredictor.enabled",
    }
    inside = {".inferenceExtension.flags", ".inferenceExtension.resources", ".inferenceExtension.sidecar.resources"}
    outside = {name for name in values if not any(name.startswith(f"{each}.") for each in inside)}
    assert outside | inside == schema - without


def test_the_chart_has_the_projects_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    assert chart["version"] == chart["appVersion"] == found[1]


def test_rendering_helpers_find_what_there_is() -> None:
    rendered = Rendered([{"kind": "A", "metadata": {"name": "x-epp"}}, {"kind": "A", "metadata": {"name": "y"}}])
    assert rendered.one("A", "-epp")["metadata"]["name"] == "x-epp"
    with pytest.raises(ValueError, match="unpack"):
        rendered.one("A")
