"""A real API server of Kubernetes on this machine: etcd and kube-apiserver, and nothing else.

In: a folder. Out: a server on free ports of loopback that answers /readyz, a kubeconfig file and the plain values of
every user; it can be killed, started again on the same data and port, and made to forget its past.
Rules: there is no controller, scheduler or kubelet: pods are objects whose status a test writes, and a deleted
namespace stays as it is. Authorization is RBAC; only ADMIN may do anything from the start.
Rejected: clients that trust any certificate: the picker's must check it as in a cluster, so they are given the CA that
the server signed its own with.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from ssl import SSLContext, create_default_context
from typing import Final

import aiohttp
import msgspec
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from epp.demo.child import Child, child, free_ports
from scripts import tools

ADMIN: Final = "admin"
EPP: Final = "epp"
STRANGER: Final = "stranger"
ACCOUNTS: Final = {EPP: "system:serviceaccount:default:epp", STRANGER: "system:serviceaccount:default:stranger"}
"""Users who stand for service accounts, without a right until a test gives them one."""
WITHIN: Final = 25.0
"""Seconds to be ready in; a tenth of it is usual, but the machine may be busy."""


class Access(msgspec.Struct, frozen=True):
    """All that a client needs to speak as one user."""

    url: str
    token: str
    ca: Path
    """A PEM file."""

    def ssl(self) -> SSLContext:
        return create_default_context(cafile=self.ca)


class ApiServer:
    """Two children and their folder; see `api_server`."""

    def __init__(self, folder: Path, binary: Path, children: AsyncExitStack) -> None:
        self.folder = folder
        self.port, self._etcd_port, self._peer_port = free_ports(3)
        self._binary = binary
        self._children = children
        self._starts: list[Child] = []

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of kube-apiserver's newest start."""
        return self._newest.pid

    def access(self, user: str = ADMIN) -> Access:
        """Of ADMIN, EPP or STRANGER."""
        return Access(self.url, _token(user), self.folder / "certificates" / "apiserver.crt")

    def kubeconfig(self, user: str = ADMIN, namespace: str = "default") -> Path:
        """Write a kubeconfig file whose current context is this user in this namespace."""
        access = self.access(user)
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "test", "cluster": {"server": access.url, "certificate-authority": str(access.ca)}},
            ],
            "users": [{"name": user, "user": {"token": access.token}}],
            "contexts": [
                {"name": "test", "context": {"cluster": "test", "user": user, "namespace": namespace}},
            ],
            "current-context": "test",
        }
        path = self.folder / f"kubeconfig-{user}-{namespace}"
        path.write_text(yaml.safe_dump(content))
        return path

    async def start(self) -> None:
        """Start kube-apiserver, again after `kill` or `stop`, and wait until it is ready.

        Raises:
            ConfigError: it ended, or is not ready in time; with its last words.
        """
        name = f"kube-apiserver-{len(self._starts) + 1}"
        started = child(name, self._binary, *self._flags(), folder=self.folder, grace=10.0)
        self._starts.append(await self._children.enter_async_context(started))
        await self._newest.until(self._is_ready, "answer to /readyz", WITHIN)

    async def kill(self) -> None:
        """End kube-apiserver with SIGKILL: connections break without a word. etcd keeps what was written."""
        self._newest.kill()
        await self._newest.process.wait()

    def end(self) -> None:
        """End kube-apiserver with SIGKILL, if it runs, and wait for nothing."""
        for start in self._starts:
            start.kill()

    async def stop(self) -> None:
        """End kube-apiserver with SIGTERM: it ends watches and finishes requests first."""
        await self._newest.stop(WITHIN)

    async def compact(self) -> int:
        """Drop every version of every object but today's from etcd.

        The server's cache of the last minutes knows them until it is started again: after `compact`, `kill` and
        `start` whoever continues a watch from before gets 410 Gone.

        Returns:
            The revision before which nothing is known; resourceVersions are these numbers.
        """
        etcd = f"http://127.0.0.1:{self._etcd_port}/v3/kv"
        async with aiohttp.ClientSession(raise_for_status=True) as session:
            async with session.post(f"{etcd}/range", json={"key": "AA==", "limit": 1}) as answer:
                revision = int((await answer.json())["header"]["revision"])
            # physical: the answer comes when it is done
            async with session.post(f"{etcd}/compaction", json={"revision": revision, "physical": True}) as answer:
                await answer.read()
        return revision

    def log(self, lines: int = 40) -> str:
        """The last lines of kube-apiserver's log, of its newest start."""
        return self._newest.output(lines) if self._starts else "not started"

    def etcd_flags(self) -> tuple[str, ...]:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self._etcd_port, self._peer_port))
        flags = {
            "data-dir": str(self.folder / "etcd"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
            "logger": "zap",
            "log-level": "error",
        }
        return tuple(f"--{name}={value}" for name, value in flags.items())

    def _flags(self) -> tuple[str, ...]:
        flags = {
            "etcd-servers": f"http://127.0.0.1:{self._etcd_port}",
            "bind-address": "127.0.0.1",
            "advertise-address": "127.0.0.1",  # also the name in the certificate that it makes for itself
            "secure-port": str(self.port),
            "cert-dir": str(self.folder / "certificates"),
            "endpoint-reconciler-type": "none",  # the others refuse to advertise loopback
            "service-cluster-ip-range": "10.0.0.0/24",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": str(self.folder / "accounts.key"),
            "service-account-signing-key-file": str(self.folder / "accounts.key"),
            "token-auth-file": str(self.folder / "tokens.csv"),
            "authorization-mode": "RBAC",
            # Without it a server that is stopped waits a minute for clients to end their watches.
            "shutdown-watch-termination-grace-period": "1s",
            # Pods may name accounts that nobody made, and need none.
            "disable-admission-plugins": "ServiceAccount",
        }
        return tuple(f"--{name}={value}" for name, value in flags.items())

    @property
    def _newest(self) -> Child:
        return self._starts[-1]

    async def _is_ready(self) -> bool:
        access = self.access()
        if not access.ca.exists():
            return False
        try:
            async with (
                aiohttp.ClientSession(headers={"Authorization": f"Bearer {access.token}"}) as session,
                session.get(f"{self.url}/readyz", ssl=access.ssl()) as answer,
            ):
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False


@asynccontextmanager
async def api_server(folder: Path) -> AsyncIterator[ApiServer]:
    """Run an API server for as long as the block runs; skips the test where there is none to run.

    Raises:
        ConfigError: it does not start; with its last words.
    """
    binary, etcd = tools.binary("kube-apiserver"), tools.system("etcd")
    if binary is None:
        pytest.skip(tools.missing("kube-apiserver"))
    if etcd is None:
        pytest.skip(tools.missing("etcd"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accounts.key").write_bytes(_private_key())
    (folder / "tokens.csv").write_text(_tokens())
    async with AsyncExitStack() as children:
        server = ApiServer(folder, binary, children)
        await children.enter_async_context(child("etcd", etcd, *server.etcd_flags(), folder=folder))
        try:
            await server.start()
            yield server
        except BaseException:
            print(server.log())  # what a failed test shows of its own server
            raise
        finally:
            server.end()  # nobody needs what it would finish first, and a session has four of them


def _tokens() -> str:
    """The token file: token, user, uid, groups."""
    accounts = '"system:serviceaccounts,system:serviceaccounts:default"'
    lines = [f"{_token(user)},{name},{user},{accounts}" for user, name in ACCOUNTS.items()]
    return "\n".join((f"{_token(ADMIN)},{ADMIN},{ADMIN},system:masters", *lines, ""))


def _token(user: str) -> str:
    return f"{user}-token"


def _private_key() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(encoding, form, serialization.NoEncryption())
