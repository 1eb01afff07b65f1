"""The wire transport on uvloop, which production runs where it can, and whose sockets and TLS are not asyncio's.

In: "tls" or "plaintext". Out: the port, on stdout; it serves until stdin ends. `on_uvloop` runs it as a child, for the
tests' own loop is asyncio's.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from epp.extproc.http2.faults import ConnectionLimits
from tests.interop.serving import own_certificate, wire

ROOT = Path(__file__).parents[2]


async def serve(secure: bool) -> None:
    # Twice grpc's own limit of a message, for the tests that send a large one.
    async with wire(ConnectionLimits(max_message_bytes=8 << 20), own_certificate() if secure else None) as served:
        print(served.port, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@asynccontextmanager
async def on_uvloop(secure: bool) -> AsyncIterator[int]:
    """The port of such a child; when the block ends it must end well."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-W", "error", "-m", "tests.interop.uvloop_port", "tls" if secure else "plaintext")
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT)
    assert child.stdout is not None
    try:
        port = await child.stdout.readline()
        if port:
            yield int(port)
        _, err = await child.communicate(b"")  # which closes stdin
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode == 0, err.decode()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(sys.argv[1] == "tls"))
