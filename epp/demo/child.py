"""Child processes that never outlive us.

In: a command line. Out: a running child whose output lands in a file, stopped when the block ends, however it ends.
Rules: a child is its own process group, so that Ctrl-C reaches only us and we stop the parts in our order; on Linux
the kernel kills it when we die without a word (crash, SIGKILL), everywhere else `atexit` does what it can.
Rejected: one process group for all (Ctrl-C then stops Envoy before the load, and the end of every demo shows errors
that nobody made); pipes for output (a full pipe stops the child).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

from epp.errors import ConfigError

PR_SET_PDEATHSIG = 1
PORTS = range(10_000, 32_000)
"""Linux gives those from 32,768 on to whoever asks for any, other systems those from 49,152 on."""


class Child:
    """A child process and where its output goes."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def output(self, lines: int = 20) -> str:
        """The last lines that it wrote, stdout and stderr together."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child alone; nothing when it is gone."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def stop(self, grace: float = 5.0) -> int:
        """Ask it to end (SIGTERM), kill it after `grace` seconds. Returns its exit code; a signal's is negative."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                return await self.process.wait()
        except TimeoutError:
            self.kill()
            return await self.process.wait()

    def kill(self) -> None:
        """End the child and whatever it started, at once."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def until(self, ready: Callable[[], Awaitable[bool]], what: str, within: float = 20.0) -> None:
        """Look at `ready` until it is true.

        Raises:
            ConfigError: the child ended, or it took too long; the message has its last words.
        """
        deadline = asyncio.get_running_loop().time() + within
        while not await ready():
            if not self.running:
                raise ConfigError(f"{self.name} ended with code {self.process.returncode}:\n{self.output()}")
            if asyncio.get_running_loop().time() > deadline:
                raise ConfigError(f"{self.name}: no {what} within {within:g} s:\n{self.output()}")
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def child(
    name: str, *command: str | Path, folder: Path, env: Mapping[str, str] | None = None, grace: float = 5.0
) -> AsyncIterator[Child]:
    """Run a command for as long as the block runs; its output goes to `folder/name.log`.

    Raises:
        ConfigError: it cannot be started.
    """
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent(os.getpid()),
                env=None if env is None else {**os.environ, **env},
            )
        except OSError as error:
            raise ConfigError(f"{name}: cannot run {command[0]}: {error.strerror}") from error
    running = Child(name, process, log)
    atexit.register(running.kill)
    try:
        yield running
    finally:
        try:
            await asyncio.shield(running.stop(grace))
        finally:
            running.kill()
            atexit.unregister(running.kill)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, and that nobody is likely to take before a child does: none of those that the
    kernel gives to whoever asks for any, or to connections.
    """
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(PORTS)
        if port not in _given and _is_free(port):
            _given.add(port)
            found.append(port)
    return found


_given: set[int] = set()
"""Ports that were told before: children listen on them some time later."""


def _is_free(port: int) -> bool:
    family, host = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    try:
        with socket.create_server((host, port), family=family, dualstack_ipv6=family is socket.AF_INET6):
            return True
    except OSError:
        return False


def _die_with_parent(parent: int) -> Callable[[], None] | None:
    """What the child does between fork and exec, so that the kernel kills it when this thread's process ends."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded here: the child must not import or allocate much

    def before_exec() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return before_exec
