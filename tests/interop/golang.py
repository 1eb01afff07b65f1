"""grpc-go's client as a child process that is told what to do, step by step; see go/main.go for the commands."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec

from tests.contract.transport import METHOD
from tests.interop.serving import tool

LONGEST_LINE = 64 << 20


class Outcome(msgspec.Struct, frozen=True):
    """What came of a command on some of the streams of a group, the same on each."""

    streams: int
    messages: list[bytes] | None
    """Read, in order."""
    code: str
    """With which the stream ended; "": it goes on."""
    detail: str


class GoClient:
    """One channel of grpc-go."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def open(
        self,
        group: str,
        count: int = 1,
        *,
        method: str = METHOD,
        gzip: bool = False,
        deadline: float = 0.0,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Open so many streams at once."""
        given = {"count": count, "method": method, "gzip": gzip, "deadline": deadline, "metadata": metadata or {}}
        await self._do("open", group, given)

    async def send(self, group: str, message: bytes) -> None:
        """Send a message on each."""
        await self._do("send", group, {"message": base64.b64encode(message).decode()})

    async def read(self, group: str) -> list[Outcome]:
        """Read a message from each."""
        return await self._do("read", group)

    async def finish(self, group: str) -> list[Outcome]:
        """Say no more, and read each to its end."""
        return await self._do("finish", group)

    async def cancel(self, group: str) -> None:
        await self._do("cancel", group)

    async def _do(self, command: str, group: str, more: Mapping[str, object] | None = None) -> list[Outcome]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(msgspec.json.encode({"do": command, "group": group, **(more or {})}) + b"\n")
        await stdin.drain()
        line = await stdout.readline()
        assert line, f"the Go client ended: {await self._last_words()}"
        return msgspec.json.decode(line, type=list[Outcome])

    async def _last_words(self) -> str:
        assert self._process.stderr is not None
        return (await self._process.stderr.read()).decode()


@asynccontextmanager
async def go_client(address: str, *, secure: bool = False, keepalive: str = "0s") -> AsyncIterator[GoClient]:
    """Run the client for as long as the block runs; skips the test where it is not built.

    Args:
        keepalive: the silence, as Go writes it, after which it pings; 0: it does not, and 10 s are the least.
    """
    pipe = asyncio.subprocess.PIPE
    flags = ("-address", address, f"-tls={secure}".lower(), f"-keepalive={keepalive}")
    process = await asyncio.create_subprocess_exec(
        tool("grpc-go-client"), *flags, stdin=pipe, stdout=pipe, stderr=pipe, limit=LONGEST_LINE
    )
    try:
        yield GoClient(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
