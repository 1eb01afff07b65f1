"""Seeds for the fuzzers, from the sessions that the tests feed: `python -m fuzz.corpus` writes them all.

They go to `out/fuzz/TARGET`, which git ignores: libFuzzer adds what it finds, and all can be made again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from tests.http2.peer import CALL, GRPC, message
from tests.http2.test_rules import HARMLESS, RULES

PLACE: Final = Path(__file__).parent.parent / "out" / "fuzz"


def said(target: str) -> list[bytes]:
    """What one target starts from. Bytes of ours in the middle of a provider's choices are still bytes worth trying."""
    if target == "connection":
        return [rule.said for rule in RULES] + list(HARMLESS.values())
    if target == "heads":
        return [CALL, *(each.said[9:] for each in RULES if each.said[3:4] == b"\x01"), repr(GRPC).encode()]
    return [message(b"abc"), message(b""), message(bytes(900)) * 2, message(b"x" * 1_001), b"\x01" + message(b"z")]


def seeds(target: str, place: Path = PLACE) -> Path:
    """The folder of one target's corpus, with the seeds in it."""
    folder = place / target
    folder.mkdir(parents=True, exist_ok=True)
    for each in said(target):
        (folder / hashlib.sha256(each).hexdigest()[:16]).write_bytes(each)
    return folder


if __name__ == "__main__":
    for name in ("connection", "heads", "messages"):
        print(seeds(name))
