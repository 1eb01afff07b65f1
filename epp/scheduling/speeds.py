"""How fast each engine is, learned from what its own page counts.

In: for a piece of time in which an engine was busy, what it did. Out: the constants of its step time, by slot.
The model is `t = a0 steps + a1 prompt tokens + a2 answer tokens + a3 context + a4 pairs`, summed over the steps:
context is read once a step for each request that is answered, pairs are query-key pairs of prompts. All but the last
two are counters on the page; those two come of what was sent there.
Rules here:
- Weighted least squares with forgetting. Each piece of time weighs the same whatever its length, as its error is taken
  relative to it: so one in which the engine also stood still hardly counts, and none can carry the rest away.
- Where little was seen the constants stay near those of the pool, which begin at `PRIOR`, times one factor: how slow
  the engine is on the whole, which a few pieces tell. So endpoints that are alike look alike, a new one begins as the
  others are, and a slow GPU among fast ones, or a pool of slow ones, is found out as it works.
- Each constant stays within `MOST` times, and 1 / `MOST` of, its prior: who divides by them is safe.
Rejected: mean times (time to first token by prompt tokens): they grow with the load, which is what is to be foretold;
a model for each kind of GPU by its name: it would have to be right for every engine, version and flag.
Source: step time as in `epp/sim/profile.py` (linear fits of vLLM v1 steps, BLIS and Vidur); recursive least squares
with exponential forgetting (Ljung 1999, 11.2), here by its normal equations.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from epp.endpoints.table import Bools, Floats, all_true

TERMS: Final = 5
"""Steps, prompt tokens, answer tokens, context, pairs."""
PRIOR: Final[Floats] = np.array([10e-3, 50e-6, 5e-6, 0.06e-6, 1.5e-9])
"""Seconds for each: the middle of models of 8 to 70 billion parameters on one to four GPUs."""
MOST: Final = 16.0
MEMORY: Final = 0.995
"""Weight of what is one piece of time older: a half after 140 of them. Long prompts, which alone tell `a4`, are rare;
with 0.97 it was forgotten between two of them."""
TRUST: Final = 0.1
"""What the pool's constants weigh, in pieces of time."""
WHOLE: Final = 0.01
"""What it weighs, likewise, that an engine is on the whole as slow as the pool."""
POOL: Final = 0.05
"""Part of the pool's constants that one endpoint's answer replaces."""

_EYE: Final = np.eye(TERMS)

Terms = tuple[float, float, float, float, float]
Matrix = npt.NDArray[np.float64]


class Speeds:
    """Constants by slot. Factors are kept: how many times slower than `PRIOR` each of them is."""

    def __init__(self) -> None:
        self._factors: Floats = np.ones((TERMS, 0))
        self._constants: Floats | None = None
        """Factors times `PRIOR`, until something else is learned."""
        self._learned: Bools = np.zeros(0, np.bool_)
        self._normal: dict[int, tuple[Matrix, Floats]] = {}
        self._pool: Floats = np.ones(TERMS)

    def of(self, slots: npt.NDArray[np.int64], width: int) -> Floats:
        """Constants of these slots in seconds, shape (TERMS, N).

        Args:
            width: every slot is below it.
        """
        if width > self._factors.shape[1]:
            self._grow(width)
        if self._constants is None:
            self._constants = self._factors * PRIOR[:, None]
        return self._constants.take(slots, axis=1)

    def learned(self, slots: npt.NDArray[np.int64]) -> Bools:
        """Of which slots anything was learned, shape (N,). Call `of` first."""
        return self._learned.take(slots)

    def learn(self, slot: int, did: Terms, seconds: float) -> None:
        """An engine was busy for so many seconds, and did this."""
        if slot >= self._factors.shape[1]:
            self._grow(slot + 1)
        row = np.asarray(did) * PRIOR / seconds
        foreseen = float(row @ self._factors[:, slot])
        if foreseen > 2.0:
            row *= 2.0 / foreseen
        matrix, vector = self._normal.get(slot, (np.zeros((TERMS, TERMS)), np.zeros(TERMS)))
        matrix = MEMORY * matrix + row[:, None] * row
        vector = MEMORY * vector + row * min(1.0, 2.0 / max(foreseen, 1e-9))
        self._normal[slot] = matrix, vector
        self._learned[slot] = True
        factors = self._factors[:, slot] = _solved(matrix, vector, self._pool)
        self._pool += POOL * (factors - self._pool)
        if not all_true(self._learned):
            self._factors[:, ~self._learned] = self._pool[:, None]
        self._constants = None

    def forget(self, slot: int) -> None:
        """The slot will mean another endpoint."""
        if self._normal.pop(slot, None) is not None:
            self._factors[:, slot] = self._pool
            self._learned[slot] = False
            self._constants = None

    def _grow(self, width: int) -> None:
        new = np.repeat(self._pool[:, None], width - self._factors.shape[1], axis=1)
        self._factors, self._constants = np.concatenate((self._factors, new), axis=1), None
        self._learned = np.append(self._learned, np.zeros(new.shape[1], np.bool_))


def _solved(matrix: Matrix, vector: Floats, pool: Floats) -> Floats:
    """Factors that fit what was seen, near the pool's times how slow this engine is on the whole.

    Rows of a slow engine are small, for they are parts of its time: what the pool weighs is made smaller alike.
    """
    whole = (float(pool @ vector) + WHOLE) / (float(pool @ matrix @ pool) + WHOLE)
    whole = min(max(whole, 1.0 / MOST), MOST)
    trust = TRUST / max(1.0, whole * whole)
    found = np.linalg.solve(matrix + trust * _EYE, vector + trust * whole * pool)
    factors: Floats = np.minimum(np.maximum(found, 1.0 / MOST), MOST)
    return factors
