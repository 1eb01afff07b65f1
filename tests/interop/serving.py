"""The wire transport in this process, and what is asked of it: ext_proc of a real picker over one endpoint, and health.

In: limits, TLS, a port. Out: a running port whose counts a test can read, and the messages of one exchange as Envoy
would write them. After every use nothing is in flight and nothing of ours broke.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep

from epp.extproc.conversation import Conversation
from epp.extproc.events import BodylessRequest, BodyMode, Modes, Part, RequestEnded, RequestStarted, ResponseStarted
from epp.extproc.exchange import Limits
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.transport.options import Methods, Tls
from epp.extproc.transport.wire import WireTransport
from epp.telemetry.health import Health
from epp.telemetry.tls import self_signed
from scripts import tools
from tests.contract.transport import METHOD, picker_for
from tests.extproc import oracle
from tests.extproc.transcripts import WORDS
from tests.watching import Watch

LIGHT: Final = Modes(BodyMode.FULL_DUPLEX, BodyMode.NONE)
ENDPOINT: Final = "10.0.0.1:8000"
GET: Final = oracle.message(BodylessRequest(WORDS["GET"]), LIGHT).SerializeToString()
"""The first message of an exchange; one reply answers it, which names ENDPOINT."""
ANSWERED: Final = oracle.message(ResponseStarted(WORDS["OK"], LIGHT), None).SerializeToString()
"""The second, when the model server's answer begins; one empty reply."""
UPLOAD: Final = oracle.message(RequestStarted(WORDS["POST"], LIGHT), LIGHT).SerializeToString()
"""The first message of a request whose body follows; no reply before that has ended."""

CHECK: Final = "/grpc.health.v1.Health/Check"
WATCH: Final = "/grpc.health.v1.Health/Watch"
SERVING: Final = b"\x08\x01"
NOT_SERVING: Final = b"\x08\x02"
"""grpc.health.v1.HealthCheckResponse, its one field."""


class Wire:
    """A port of the wire transport."""

    def __init__(self, transport: WireTransport, port: int, watch: Watch, health: Health) -> None:
        self.transport = transport
        self.port = port
        self.watch = watch
        self.health = health

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def breaches(self) -> dict[str, int]:
        return dict(self.transport.breaches)

    async def idle(self) -> None:
        """Wait until the server has seen the end of every stream."""
        await until(lambda: self.transport.streams_open == 0)


@asynccontextmanager
async def wire(
    limits: ConnectionLimits | None = None,
    tls: Tls | None = None,
    *,
    port: int = 0,
    endpoint: str = ENDPOINT,
    body: Limits | None = None,
) -> AsyncIterator[Wire]:
    """Serve for as long as the block runs."""
    watch = Watch()
    picker = picker_for((endpoint,), watch)
    asked = body or Limits()
    health = Health()
    health.set_ready(True)
    methods: Methods = {
        METHOD: lambda connection, push, now: Conversation(picker, asked, connection, now),
        **health.methods(),
    }
    transport = WireTransport(methods, limits or ConnectionLimits(), asyncio.get_running_loop().time)
    bound = await transport.listen("127.0.0.1", port, tls)
    try:
        yield Wire(transport, bound, watch, health)
    finally:
        await transport.stop(0)
    assert transport.streams_open == 0
    assert picker.table.column("inflight", picker.table.listed, 0.0)[0].sum() == 0
    watch.check()


def own_certificate() -> Tls:
    key, certificate = self_signed()
    return Tls(key, certificate)


def upload(body: bytes) -> bytes:
    """The message behind UPLOAD: a whole body."""
    message: bytes = oracle.message(RequestEnded(Part.BODY, body), None).SerializeToString()
    return message


def is_routed(reply: bytes) -> bool:
    """It is the answer to a request's headers, and names ENDPOINT."""
    headers = ep.ProcessingResponse.FromString(reply).request_headers.response.header_mutation.set_headers
    return any(each.header.raw_value == ENDPOINT.encode() for each in headers)


def body_of(replies: list[bytes]) -> bytes:
    """The request's body in these replies, put together."""
    bodies = [ep.ProcessingResponse.FromString(reply).request_body.response.body_mutation for reply in replies]
    return b"".join(body.streamed_response.body for body in bodies)


def tool(name: str) -> Path:
    """A binary that scripts/tools.py builds; the test is skipped where it is not."""
    path = tools.binary(name)
    if path is None:
        pytest.skip(tools.missing(name))
    return path


def program(name: str) -> Path:
    """A program of the system; the test is skipped where it has none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here: install it")
    return Path(path)


async def until(true: Callable[[], object], within: float = 10.0) -> None:
    """Look again and again until it is so. Raises TimeoutError."""
    async with asyncio.timeout(within):
        while not true():
            await asyncio.sleep(0.005)


async def run(*command: str | Path, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    """Run a program to its end: exit code, stdout, stderr."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        out, err = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out, err
