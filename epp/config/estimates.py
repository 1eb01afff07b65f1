"""Parameters of token-producer's estimate: what an image or a video counts, in the reference's names and ranges.

They are checked, and change nothing yet: an image, audio or video counts 225 tokens (640 x 360 / 1024, the default),
whatever is inside it.
Source: llm-d router, token-producer.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from epp.scheduling.plugin import Params

AtLeastOne = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Amount = Annotated[float, Meta(ge=0)]
ByPixels = Literal["dynamic", "static"]


class Resolution(Params, frozen=True):
    width: AtLeastOne
    """Pixels."""
    height: AtLeastOne
    """Pixels."""


class PixelsPerToken(Params, frozen=True):
    factor: AtLeastOne = 1024
    """Pixels for each token."""


class StaticImage(Params, frozen=True):
    static_token: Count = 0
    """Tokens of an image."""


class Image(Params, frozen=True):
    mode: ByPixels = "dynamic"
    """dynamic: width x height / factor. static: staticToken, whatever the image."""
    default_resolution: Resolution = Resolution(width=640, height=360)
    """Of an image that does not tell its own."""
    dynamic: PixelsPerToken = PixelsPerToken()
    """For the mode dynamic."""
    static: StaticImage = StaticImage()
    """For the mode static."""


class StaticFrame(Params, frozen=True):
    num_tokens_per_frame: Count = 0
    """Tokens of a frame."""


class TokensPerFrame(Params, frozen=True):
    mode: ByPixels | None = None
    """As an image's; not given: the reference's choice."""
    dynamic: PixelsPerToken = PixelsPerToken()
    """For the mode dynamic."""
    static: StaticFrame = StaticFrame()
    """For the mode static."""


class Sampled(Params, frozen=True, rename={"sample_fps": "sampleFPS", "temporal_patch_size": "temporalPatchSize"}):
    sample_fps: Amount = 0.0
    """Frames looked at in a second."""
    temporal_patch_size: Count = 0
    """So many frames become one."""


class Strided(Params, frozen=True, rename={"default_source_fps": "defaultSourceFPS", "frame_stride": "frameStride"}):
    default_source_fps: Amount = 0.0
    """Frames a second of a video whose request does not tell (x-llm-d-video-fps)."""
    frame_stride: Count = 0
    """Every so many frames one is looked at."""


class Frames(Params, frozen=True):
    mode: Literal["sampled", "strided"] | None = None
    """sampled: duration x sampleFPS. strided: duration x frames a second / frameStride."""
    min_frames: Count = 0
    """At least so many."""
    max_frames: Count = 0
    """At most so many; 0: no limit."""
    sampled: Sampled = Sampled()
    """For the mode sampled."""
    strided: Strided = Strided()
    """For the mode strided."""


class Video(Params, frozen=True):
    default_resolution: Resolution | None = None
    """Of a video whose request does not tell (x-llm-d-video-resolution)."""
    default_duration: Amount = 0.0
    """Seconds of a video whose request does not tell (x-llm-d-video-duration-seconds)."""
    tokens_per_frame: TokensPerFrame = TokensPerFrame()
    """What a frame counts."""
    frames: Frames = Frames()
    """How many frames count."""
    max_video_tokens: Count = 0
    """At most so many; 0: no limit."""


class Estimate(Params, frozen=True):
    image: Image = Image()
    """How many tokens an image is taken for."""
    video: Video = Video()
    """How many a video is."""
