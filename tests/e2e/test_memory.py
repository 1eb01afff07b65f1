"""What one large prompt costs the picker in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.client import chat, post

if TYPE_CHECKING:
    from tests.e2e.site import Site

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

MIB = 1 << 20


def memory(pid: int, what: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most since `forget_peak`)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0]) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@pytest.mark.parametrize("gateway", ["light", "buffered"])
async def test_a_prompt_of_four_megabytes_costs_less_than_100_mib(site: Site, gateway: str) -> None:
    pid = site.picker.process.pid
    body = chat(user="word " * (4 * MIB // 5))
    forget_peak(pid)
    before = memory(pid, "VmRSS")
    got = await site.send(gateway, post("/v1/chat/completions", body))
    assert got.status == 200
    assert [len(seen.body) for seen in site.seen] == [len(body)]
    more = memory(pid, "VmHWM") - before
    print(f"{more / MIB:.0f} MiB more at the peak")
    assert more <= 100 * MIB
