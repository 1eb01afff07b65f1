"""Prompts as a tree of runs, in columns: what there is, and which slots hold how much of it.

A run is a stretch of blocks in which no prompt has ended or branched off, so a prompt is a few runs however long it is.
Rules here:
- A run is a row; row 0 is the root, of no blocks. Rows are used again.
- Who holds what follows a run holds the run whole; a run that nobody holds whole is as long as the longest part held.
- `size` is what all of this takes, counted as it changes.
How: first blocks, which runs are looked up by, and links in arrays, 40 bytes a run; the blocks behind the first as one
`bytes`; holders as an int, a set of slots whose intersection is one operation however many endpoints there are. Most
runs have one holder, and the int of each slot alone exists once; two to four are kept as digits where that is shorter.
Rejected: an object a run, found by a dict (292 bytes where a run is one block, with what its holder keeps of it, and
80 ms of the garbage collector for 200,000; this takes 64, and 2 ms).
Source: SGLang's radix cache, for the tree.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from epp.prefix.hashing import HASH_BYTES
from epp.prefix.lookup import Lookup

RUN_BYTES: Final = 40
"""Columns, pointers and cells of a run: 32, a cell of 5 to 6, and what growing arrays have in reserve."""
TEXT_BYTES: Final = 40
"""What a `bytes` takes beside its contents."""
SET_BYTES: Final = 28
"""What an int takes beside its digits, 30 bits in 4 bytes."""
PACKED: Final = 4
"""Slots of a set that is kept as digits, at most."""
PACK_FROM: Final = 120
"""Bits from which digits are shorter."""
_SPREAD: Final = 0x9E3779B1


class Runs:
    """The tree. Whoever asks about a run has it from here and knows that it is still there."""

    def __init__(self) -> None:
        self._first = array("Q", (0,))
        self._before = array("I", (0,))  # of a free row: the next free one
        self._following = array("I", (0,))
        self._rest: list[bytes] = [b""]
        self._whole: list[int] = [0]  # a bit set, or below 0: `_packed`
        self.cut: dict[int, int] = {}
        """Bit set of the slots that hold only a run's beginning, where there are any."""
        self._free = 0
        self._lookup = Lookup(self._before, self._first, self._hash_of)
        self._alone: dict[int, int] = {}
        self.blocks = 0
        """Different blocks; one block behind two beginnings is two."""
        self.size = 0
        """Bytes, but for what an empty tree takes."""

    def follow(self, run: int, hashes: bytes, at: int) -> int:
        """The run after this one that begins with the block at byte `at`; 0: there is none."""
        first = hashes[at : at + HASH_BYTES]
        if not first:
            return 0
        return self._lookup.find(_hash(run, first), run, int.from_bytes(first, "little"))

    def shared(self, run: int, hashes: bytes, at: int) -> int:
        """How many leading blocks of a run are those that begin at byte `at`, of which the first is."""
        rest, at = self._rest[run], at + HASH_BYTES
        if not rest or hashes.startswith(rest, at):
            return 1 + len(rest) // HASH_BYTES
        low, high = 0, len(rest) // HASH_BYTES
        while high - low > 1:
            middle = (low + high) // 2
            known = low * HASH_BYTES
            if hashes.startswith(rest[known : middle * HASH_BYTES], at + known):
                low = middle
            else:
                high = middle
        return 1 + low

    def length(self, run: int) -> int:
        """Blocks of a run."""
        return 1 + len(self._rest[run]) // HASH_BYTES

    def is_last(self, run: int) -> bool:
        """Nothing follows."""
        return not self._following[run]

    def whole(self, run: int) -> int:
        """Bit set of the slots that hold all of a run."""
        bits = self._whole[run]
        return bits if bits >= 0 else _unpacked(bits)

    def holders(self, run: int) -> int:
        """Bit set of the slots that hold any of it."""
        return self.whole(run) | self.cut[run] if run in self.cut else self.whole(run)

    # -- what changes --------------------------------------------------------------------------------------------

    def make(self, before: int, hashes: bytes) -> int:
        """New blocks after a run; nobody holds them yet."""
        run = self._free
        if run:
            self._free = self._before[run]
        else:
            run = len(self._rest)
            self._first.append(0)
            self._before.append(0)
            self._following.append(0)
            self._rest.append(b"")
            self._whole.append(0)
        self._put(run, before, hashes[:HASH_BYTES])
        self._set_rest(run, hashes[HASH_BYTES:])
        self.blocks += len(hashes) // HASH_BYTES
        self.size += RUN_BYTES
        return run

    def lengthen(self, run: int, hashes: bytes) -> None:
        """New blocks at the end of a run that is the last; who holds it whole holds them."""
        self._set_rest(run, self._rest[run] + hashes)
        self.blocks += len(hashes) // HASH_BYTES

    def shorten(self, run: int, blocks: int) -> None:
        """A run, which is the last, ends after so many of its blocks, at least one."""
        self.blocks -= self.length(run) - blocks
        self._set_rest(run, self._rest[run][: (blocks - 1) * HASH_BYTES])

    def remove(self, run: int) -> None:
        """Nobody holds any of a run, which is the last, any more."""
        rest = self._rest[run]
        self.blocks -= 1 + len(rest) // HASH_BYTES
        self.size -= RUN_BYTES + _text_bytes(rest) + _set_bytes(self._whole[run])
        self._take(run)
        self._rest[run], self._whole[run] = b"", 0
        self.cut.pop(run, None)
        self._before[run], self._free = self._free, run

    def split(self, run: int, blocks: int) -> int:
        """Make the first blocks of a run one of their own, which nobody holds yet; the run becomes what follows it."""
        before, first = self._before[run], self._first[run].to_bytes(HASH_BYTES, "little")
        rest, cut = self._rest[run], (blocks - 1) * HASH_BYTES
        self._take(run)
        front = self.make(before, first + rest[:cut])
        self.blocks -= blocks  # those it made are none that were not there
        self._put(run, front, rest[cut : cut + HASH_BYTES])
        self._set_rest(run, rest[cut + HASH_BYTES :])
        return front

    def hold(self, run: int, whole: int, cut: int) -> None:
        """These sets of slots hold all of a run, and its beginning."""
        if not whole & (whole - 1):
            whole = self._alone.setdefault(whole, whole)
        elif whole.bit_length() > PACK_FROM and whole.bit_count() <= PACKED:
            whole = _packed(whole)
        self.size += _set_bytes(whole) - _set_bytes(self._whole[run])
        self._whole[run] = whole
        if cut:
            self.cut[run] = cut
        elif run in self.cut:
            del self.cut[run]

    # -- inside --------------------------------------------------------------------------------------------------

    def _put(self, run: int, before: int, first: bytes) -> None:
        self._first[run], self._before[run] = int.from_bytes(first, "little"), before
        self._following[before] += 1
        self._lookup.put(_hash(before, first), run)

    def _take(self, run: int) -> None:
        self._lookup.drop(self._hash_of(run), run)
        self._following[self._before[run]] -= 1

    def _set_rest(self, run: int, rest: bytes) -> None:
        self.size += _text_bytes(rest) - _text_bytes(self._rest[run])
        self._rest[run] = rest

    def _hash_of(self, run: int) -> int:
        return _hash(self._before[run], self._first[run].to_bytes(HASH_BYTES, "little"))


def _hash(before: int, first: bytes) -> int:
    """Of bytes, so that who chooses his blocks cannot choose them for one cell: Python's hash of bytes is secret.

    It says where a run is kept, never what is decided.
    """
    return hash(first) ^ before * _SPREAD


def _text_bytes(rest: bytes) -> int:
    return len(rest) + TEXT_BYTES if rest else 0


def _set_bytes(bits: int) -> int:
    """Of a set as it is kept; the set of one slot, or none, exists once."""
    return SET_BYTES + bits.bit_length() // 30 * 4 if bits < 0 or bits & (bits - 1) else 0


def _packed(bits: int) -> int:
    """A few slots as digits instead of bits: 36 bytes for four of them, where bits take up to 160 for 1,000 slots."""
    packed = 0
    for slot in reversed([*slots_in(bits)]):  # the highest first: 0 could not stand there
        packed = packed << 16 | slot
    return ~packed


def _unpacked(packed: int) -> int:
    bits, packed = 0, ~packed
    while packed:
        bits |= 1 << (packed & 0xFFFF)
        packed >>= 16
    return bits


def slots_in(bits: int) -> Iterator[int]:
    """The slots in a bit set, rising."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def members(bits: int) -> npt.NDArray[np.intp] | int:
    """The slots in a bit set, as an index into an array."""
    if not bits & (bits - 1):  # one alone needs no array: 3 us less, and most prompts are held by one
        return bits.bit_length() - 1
    raw = np.frombuffer(bits.to_bytes(bits.bit_length() // 8 + 1, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(raw, bitorder="little"))
