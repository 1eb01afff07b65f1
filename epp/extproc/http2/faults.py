"""What a peer did wrong, and how much of it we take.

Rules here:
- A fault of a stream ends that stream, a fault of the connection ends the connection; each says with which code.
- A breach of a limit names the limit: it is counted by that name.
Source of the defaults: stated at each.
"""

from __future__ import annotations

import msgspec

from epp.errors import ConfigError, ProtocolError
from epp.extproc.http2.frames import DEFAULT_WINDOW, FRAME_BYTES, LARGEST_WINDOW, Code


class Fault(ProtocolError):
    """The peer broke HTTP/2, or a limit."""

    def __init__(self, code: Code, message: str, limit: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.limit = limit
        """Name of the limit that was passed; "": it is a plain protocol error."""


class ConnectionFault(Fault):
    """Ends the connection (RFC 9113 section 5.4.1)."""


class StreamFault(Fault):
    """Ends one stream (section 5.4.2)."""


class ConnectionLimits(msgspec.Struct, frozen=True):
    """How much of everything one connection may use. Times are in seconds."""

    max_streams: int = 10_000
    """Open at once; more are refused with REFUSED_STREAM, which is safe to retry. A stream lives as long as a model's
    answer. grpc-go has no limit; Envoy as a client opens no more than its circuit breaker's max_requests, 1,024."""
    max_header_bytes: int = 60 * 1024
    """Header list as RFC 9113 section 6.5.2 counts it, and header block as sent. Envoy: max_request_headers_kb 60."""
    max_continuations: int = 8
    """CONTINUATION frames in one header block. nghttp2: NGHTTP2_DEFAULT_MAX_CONTINUATIONS 8, since CVE-2024-28182."""
    max_resets: int = 500
    """Streams a second that the peer opens and resets within a second (rapid reset, CVE-2023-44487), or makes us reset
    (CVE-2025-8671); one more for each frame that we sent, so that answered ones do not count. Envoy closes a connection
    when at least half of overload.premature_reset_total_stream_count, 500, ended so without an answer."""
    max_control_frames: int = 1_000
    """Frames a second that carry no work: PING, SETTINGS (each setting), PRIORITY, WINDOW_UPDATE, unknown ones, and
    whatever is for streams that have ended or are refused; `control_frames_per_data` more for each frame that we sent.
    Envoy bounds what they make it answer: max_outbound_control_frames 1,000."""
    control_frames_per_data: int = 10
    """Envoy: max_inbound_window_update_frames_per_data_frame_sent 10. grpc-go's bandwidth estimate pings about once for
    each DATA frame it gets."""
    max_empty_frames: int = 1
    """DATA frames in a row on a stream without a byte and without an end. Envoy:
    max_consecutive_inbound_frames_with_empty_payload 1."""
    max_message_bytes: int = 4 * 1024 * 1024
    """Largest gRPC message, decompressed. grpc-go: 4 MiB; the transport sets it from the largest body."""
    max_held_bytes: int = 256 * 1024 * 1024
    """Parts of messages that are not whole yet, over all streams; the call that passes it ends with RESOURCE_EXHAUSTED.
    One message always has room. Ours: 64 prompts of 4 MiB at once. grpc-go knows no such bound."""
    max_queued_bytes: int = 64 * 1024 * 1024
    """Replies that wait for the peer's windows, over all streams; the stream that passes it is reset. Ours."""
    stream_window: int = 256 * 1024
    """Bytes that the peer may send on a stream before we have taken them; at least 65,535, which it may send before it
    knows. Ours: a 100 KB prompt needs no round trip. Envoy as an edge: 64 KiB."""
    connection_window: int = 16 * 1024 * 1024
    """The same over all streams; ours. Envoy as an edge: 1 MiB, for clients it does not trust."""
    max_frame_bytes: int = FRAME_BYTES
    """Largest frame read. RFC 9113's default and smallest; more would only lengthen the pieces read at once."""
    preface_timeout: float = 10.0
    """For the preface and SETTINGS, and for the rest of a header block. Go's net/http2: prefaceTimeout 10 s."""
    message_timeout: float = 60.0
    """From a stream's headers to its first message, and from a message's first byte to its last. nginx:
    client_body_timeout 60 s, between two reads."""
    keepalive: float = 60.0
    """Silence after which we ask by PING whether the peer is there: streams of a node that is gone would stay counted.
    grpc-go: 2 hours. Envoy: off."""
    keepalive_timeout: float = 20.0
    """For its answer, and for a peer that takes no bytes. grpc-go: 20 s."""

    def __post_init__(self) -> None:
        """Raises ConfigError for what HTTP/2 does not allow."""
        for name, least, most in (
            ("stream_window", DEFAULT_WINDOW, LARGEST_WINDOW),
            ("connection_window", DEFAULT_WINDOW, LARGEST_WINDOW),
            ("max_frame_bytes", FRAME_BYTES, 2**24 - 1),
            ("max_message_bytes", 0, 2**32 - 1),
            ("max_streams", 0, 2**32 - 1),
            ("max_header_bytes", 0, 2**32 - 1),
        ):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"HTTP/2's {name} is {getattr(self, name)}: choose from {least} to {most}")
