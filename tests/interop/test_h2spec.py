"""h2spec, every case it has for a server: RFC 9113's ancestor, HPACK, and what all servers should do."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.interop.serving import own_certificate, run, tool, wire
from tests.interop.uvloop_port import on_uvloop

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

CASES = 145
"""That h2spec 2.2.1 has."""
SKIPPED: dict[str, str] = {}
"""By name, with why. h2spec skips what a server's SETTINGS make impossible."""


def told(report: Path) -> dict[str, list[str]]:
    """Names of the cases, by how they went."""
    cases: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase"):
        went = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        name = f"{case.get('package')}: {case.get('classname')}"
        cases[re.sub("failure|error", "failed", went)].append(name)
    return cases


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("secure", [False, True], ids=["plaintext", "tls"])
async def test_every_case_passes(secure: bool, loop: str, tmp_path: Path) -> None:
    binary, report = tool("h2spec"), tmp_path / "report.xml"
    async with listening(secure, loop) as port:
        where = ("-h", "127.0.0.1", "-p", str(port), "-j", report, "--timeout", "10")  # a busy machine is no fault
        code, out, err = await run(binary, "generic", "http2", "hpack", *where, *(("-t", "-k") if secure else ()))
    cases = told(report)
    assert cases["failed"] == [], out.decode() + err.decode()
    assert sorted(cases["skipped"]) == sorted(SKIPPED)
    assert len(cases["passed"]) == CASES - len(SKIPPED)
    assert code == 0


@asynccontextmanager
async def listening(secure: bool, loop: str) -> AsyncIterator[int]:
    if loop == "uvloop":
        async with on_uvloop(secure) as port:
            yield port
    else:
        async with wire(tls=own_certificate() if secure else None) as served:
            yield served.port
