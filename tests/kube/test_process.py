"""`epp serve` with the flags that the reference's chart passes, against a real API server and behind a real Envoy."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import aiohttp
import pytest

from epp.demo import envoy
from epp.demo.child import child, free_ports
from tests.e2e import client as http
from tests.e2e.serving import Picker, until
from tests.e2e.upstream import Upstream
from tests.kube.apiserver import ApiServer
from tests.kube.client import OBJECTIVES, POOLS, Client
from tests.kube.test_discovery import pod, pool, thing

pytestmark = pytest.mark.anyio

CHAT = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'


async def test_a_picker_of_a_pool_serves_its_pods(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    first = Upstream("127.0.0.2")
    await first.listen()
    port = int(first.address.rpartition(":")[2])
    grpc_port, health, metrics = free_ports(3)
    flags = ["--pool-name=pool", f"--pool-namespace={namespace}", "--pool-group", "inference.networking.k8s.io"]
    flags += ["--zap-encoder", "json", f"--grpc-health-port={health}", "--v=4", "--tracing=false"]
    flags += [
        f"--grpc-port={grpc_port}",
        f"--metrics-port={metrics}",
        "--drain-timeout=100ms",
        "--secure-serving=false",
    ]
    environment = ("env", f"KUBECONFIG={apiserver.kubeconfig(namespace=namespace)}")
    command = (*environment, sys.executable, "-m", "epp", "serve", *flags)
    try:
        async with child("picker", *command, folder=tmp_path) as process:
            picker = Picker(process, grpc_port, health, metrics)
            await until(picker.serving, "NOT_SERVING", within=15.0)  # there is no pool yet
            made = pool(namespace)
            made["spec"]["targetPorts"] = [{"number": port}]
            await admin.create(POOLS, made)
            await until(picker.serving, "SERVING")
            await pod(admin, namespace, "a", "127.0.0.2")
            spec = {"priority": 3, "poolRef": {"name": "pool"}}
            await admin.create(OBJECTIVES, thing(OBJECTIVES, "InferenceObjective", namespace, "urgent", spec))
            envoy.write_endpoints(tmp_path / "pool.json", [first.address])
            asked = envoy.Picker(address=picker.address)
            gateways = [envoy.Gateway(name="g", endpoints=tmp_path / "pool.json", picker=asked)]
            async with envoy.running(envoy.bootstrap(gateways), tmp_path) as gateway:

                async def status() -> int:
                    raw = b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
                    raw += b"x-llm-d-inference-objective: urgent\r\ncontent-length: %d\r\n\r\n%b" % (len(CHAT), CHAT)
                    return (await http.send(gateway.ports["g"], raw)).status

                await until(status, 200)
                assert [seen.body for seen in first.seen][-1:] == [CHAT]
    finally:
        await first.close()


async def test_a_picker_over_a_hundred_pods_is_ready_soon(
    apiserver: ApiServer, admin: Client, namespace: str, tmp_path: Path
) -> None:
    await admin.create(POOLS, pool(namespace))
    for number in range(100):
        await pod(admin, namespace, f"pod-{number}", f"127.1.0.{number + 1}")
    grpc_port, health, metrics = free_ports(3)
    flags = ["--pool-name=pool", f"--pool-namespace={namespace}", "--secure-serving=false", "--drain-timeout=100ms"]
    flags += [f"--grpc-port={grpc_port}", f"--grpc-health-port={health}", f"--metrics-port={metrics}"]
    command = ("env", f"KUBECONFIG={apiserver.kubeconfig(namespace=namespace)}", sys.executable, "-m", "epp", "serve")
    began = time.monotonic()
    async with child("picker", *command, *flags, folder=tmp_path) as process:
        picker = Picker(process, grpc_port, health, metrics)
        await until(picker.serving, "SERVING", within=15.0)
        print(f"ready after {time.monotonic() - began:.1f} s with 100 pods")

        headers = {"Authorization": f"Bearer {admin.access.token}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(f"{picker.pages}/debug/endpoints") as page,
        ):
            assert (await page.text()).count("-rank-0") == 100
