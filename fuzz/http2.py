"""HTTP/2 and gRPC under atheris: whatever comes, in whatever order, nothing but events and the end of who is wrong.

`python -m fuzz.http2 TARGET [libFuzzer's options]`, for instance `connection -max_total_time=600`; `short` is half a
minute of all targets, the same every time. Targets:
- connection: frames, owner's calls and time in any order through `ServerConnection`, with the invariants of the tests.
- heads: header blocks, with the cache of heads and without; both must say the same.
- messages: pieces of DATA, cut in two ways; both must give the same messages.
Corpora: `fuzz/corpus.py` writes seeds from the tests' own sessions. Any exception that is no ProtocolError is a crash,
and so is whatever `Site` in tests/http2/peer.py asserts.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["epp.extproc.http2", "hpack"]):  # and what these import of it
    from epp.extproc.http2.faults import ConnectionFault, ConnectionLimits, StreamFault
    from epp.extproc.http2.heads import HeadReader
    from epp.extproc.http2.messages import CallFault, MessageReader, Status
    from fuzz.corpus import PLACE, seeds
    from tests.http2.peer import CALL, Site, call, data, frame, message, settings, window_update

LIMITS: Final = ConnectionLimits(
    max_streams=5,
    max_header_bytes=2_000,
    max_resets=20,
    max_control_frames=60,
    max_message_bytes=1_000,
    max_held_bytes=2_500,
    max_queued_bytes=70_000,
    stream_window=65_535,
    connection_window=70_000,
)
"""Small, so that few bytes reach every one of them."""
REPLY: Final = bytes(20_000)


def connection(said: bytes) -> None:
    provider = atheris.FuzzedDataProvider(said)
    site = Site(LIMITS)
    while provider.remaining_bytes():
        step(site, provider)
        site.check()
        if site.connection.is_closed:
            leave(site)
            site = Site(LIMITS)
    leave(site)


def leave(site: Site) -> None:
    site.out()
    site.take(site.connection.lose())
    site.check()
    assert not site.live
    assert site.connection.bytes_held == 0


def step(site: Site, provider: atheris.FuzzedDataProvider) -> None:
    """One thing that a peer, an owner or time does."""
    stream = provider.ConsumeIntInRange(0, 12)
    match provider.ConsumeIntInRange(0, 12):
        case 0 | 1:
            payload = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 60))
            site.feed(frame(provider.ConsumeIntInRange(0, 10), provider.ConsumeIntInRange(0, 255), stream, payload))
        case 2:
            site.feed(call(stream, end=provider.ConsumeBool()))
        case 3:
            content = message(provider.ConsumeBytes(10) * provider.ConsumeIntInRange(0, 120))
            cut = provider.ConsumeIntInRange(0, len(content))
            site.feed(data(stream, content[:cut]), data(stream, content[cut:], provider.ConsumeIntInRange(0, 1)))
        case 4:
            site.feed(provider.ConsumeBytes(provider.ConsumeIntInRange(0, 40)))
        case 5:
            said = call(stream) + provider.ConsumeBytes(provider.ConsumeIntInRange(0, 40))
            cut = provider.ConsumeIntInRange(0, len(said))
            site.feed(said[:cut])
            site.feed(said[cut:])
        case 6:
            site.connection.send(stream, REPLY[: provider.ConsumeIntInRange(0, len(REPLY))])
        case 7:
            site.end(stream, provider.PickValueInList(list(Status)), provider.ConsumeUnicode(20))
        case 8:
            site.tick(provider.ConsumeIntInRange(0, 30))
        case 9:
            site.connection.drain(site.now)
        case 10:
            site.feed(window_update(stream, provider.ConsumeIntInRange(0, 70_000)))
        case 11:
            site.feed(settings(initial_window=provider.ConsumeIntInRange(0, 70_000)))
        case _:
            site.out()


def heads(said: bytes) -> None:
    """Twice each block, so that the second may come from the cache."""
    provider = atheris.FuzzedDataProvider(said)
    cached, plain = HeadReader(2_000), HeadReader(2_000)
    while provider.remaining_bytes():
        block = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 80))
        block = CALL + block if provider.ConsumeBool() else block
        for _ in range(provider.ConsumeIntInRange(1, 2)):
            plain._known.clear()
            found, expected = read(cached, block), read(plain, block)
            assert found == expected, (block, found, expected)
            if found is ConnectionFault:
                return  # the tables are out of step with the peer's: nothing is read behind it


def read(reader: HeadReader, block: bytes) -> object:
    try:
        return reader.read(block)
    except StreamFault as fault:
        return fault.code, str(fault)
    except ConnectionFault:
        return ConnectionFault


def messages(said: bytes) -> None:
    provider = atheris.FuzzedDataProvider(said)
    encoding = provider.PickValueInList([b"", b"gzip"])
    whole = b""
    while provider.remaining_bytes() and len(whole) < 4_000:
        content = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 40)) * provider.ConsumeIntInRange(1, 30)
        packed = gzip.compress(content, mtime=0) if provider.ConsumeBool() else content
        framed = message(packed, provider.ConsumeIntInRange(0, 2))
        whole += framed if provider.ConsumeIntInRange(0, 3) else packed
    cuts = sorted(provider.ConsumeIntListInRange(5, 0, len(whole)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert unpacked(encoding, [whole]) == unpacked(encoding, pieces)


def unpacked(encoding: bytes, pieces: list[bytes]) -> list[bytes | str]:
    reader = MessageReader(encoding, limit=1_000)
    found: list[bytes | str] = []
    try:
        for piece in pieces:
            for content in reader.feed(piece):
                assert len(content) <= 1_000
                found.append(content)
            assert reader.held <= 1_005
    except CallFault as fault:
        found.append(str(fault))
    return found


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "connection": connection,
    "heads": heads,
    "messages": messages,
}


SHORT: Final = {"connection": 4_000, "heads": 6_000, "messages": 40_000}
"""Runs of each that take about half a minute together."""


def short() -> int:
    """The same runs every time, from the seeds alone; the first exit status that is not 0."""
    for target, runs in SHORT.items():
        with tempfile.TemporaryDirectory() as corpus:
            command = (sys.executable, "-m", "fuzz.http2", target, f"-runs={runs}", "-seed=1", "-max_len=1500")
            done = subprocess.run(  # noqa: S603 - our own words
                command, env={**os.environ, "PYTHONHASHSEED": "0", "FUZZ_CORPUS": corpus}
            )
        if done.returncode:
            return done.returncode
    return 0


def main(arguments: list[str]) -> None:
    target, *options = arguments
    if target == "short":
        sys.exit(short())
    PLACE.mkdir(parents=True, exist_ok=True)
    corpus = seeds(target, Path(os.environ.get("FUZZ_CORPUS", PLACE)))
    atheris.Setup([sys.argv[0], f"-artifact_prefix={PLACE}/", *options, str(corpus)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
