"""How often a peer may ask for what costs it little.

In: control frames and resets as they come, time as it passes. Out: a ConnectionFault when there are too many a second.
Rules here:
- Work earns control frames: a peer that is sent a lot updates windows and pings a lot. What was sent in the last two
  seconds counts, since the answer to it may come in the next one. For WINDOW_UPDATE all that was ever sent counts, and
  every call: a client that is slow to read opens its windows when it does, 3,000 streams at once if it has so many.
- Only young streams count as resets, and each frame that was sent earns one: Envoy ends nearly every healthy stream by
  RST_STREAM, clients that give up while they wait in a queue do so by hundreds, and a stream with an answer that the
  peer's own window keeps back is none that was answered. Envoy counts its client's so: young, and the greater part.
Source: Envoy for windows, 2 * (streams + 10 * DATA frames sent) over a connection's life;
CVE-2019-9512 to 9518 (floods), CVE-2023-44487 (rapid reset), CVE-2025-8671 (a peer that makes us reset).
"""

from __future__ import annotations

from epp.extproc.http2.faults import ConnectionFault, ConnectionLimits
from epp.extproc.http2.frames import Code


class Pace:
    """Counts of the second at hand."""

    __slots__ = ("_control_frames", "_limits", "_resets", "_sent", "_sent_before", "_window_updates", "ends", "opened")

    def __init__(self, limits: ConnectionLimits, now: float) -> None:
        self._limits = limits
        self.ends = now + 1.0
        """When `turn` is due."""
        self.opened = 0
        """Streams, ever."""
        self._window_updates = 0
        """Ever."""
        self._control_frames = 0
        self._resets = 0
        self._sent = self._sent_before = 0
        """Frames sent on this connection, at the beginning of this second and of the one before."""

    def turn(self, sent: int, now: float) -> None:
        """Another second begins, and so many frames have been sent in all."""
        self.ends, self._control_frames, self._resets = now + 1.0, 0, 0
        self._sent_before, self._sent = self._sent, sent

    def control_frame(self, sent: int, weight: int = 1) -> None:
        """Raises ConnectionFault when it is one too many."""
        self._control_frames += weight
        earned = self._limits.control_frames_per_data * (sent - self._sent_before)
        if self._control_frames > self._limits.max_control_frames + earned:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many frames without work", "max_control_frames")

    def window_update(self, sent: int) -> None:
        """Raises ConnectionFault when it is one too many."""
        self._window_updates += 1
        if self._window_updates > 2 * (self.opened + self._limits.control_frames_per_data * sent):
            self.control_frame(sent)

    def reset(self, sent: int) -> None:
        """Raises ConnectionFault when it is one too many."""
        self._resets += 1
        if self._resets > self._limits.max_resets + sent - self._sent_before:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many streams opened only to be reset", "max_resets")
