"""How much time and memory one video may cost before it is given up.

In:   numbers from a configuration.
Out:  DecodeLimits, and the seconds that one request may take.
Cost: none.
Errors: ValueError for a limit that is not positive.
"""

from __future__ import annotations

import dataclasses

from pipeline.decode.records import DecodeRequest, MediaSource

# A disk or object store that is slower than this has failed; used for the time to read a source once.
_SLOWEST_BYTES_PER_SECOND = 10e6
# Frames per second that an fps grid's source is assumed to have at most, to turn positions into frames to decode.
_HIGHEST_SOURCE_FPS = 60


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """Limits per video or image, and per decode process.

    timeout_seconds: allowed for any request, however small: opening, a cold file system. Waiting for a core does not
        count.
    seconds_per_frame: allowed on top for each frame up to the last wanted one. 0.1 is ten frames a second, a third of
        the speed at which one core decodes 4K HEVC with 10 bits.
    max_pixels: of one frame, as stored and as scaled; the default is an 8K frame.
    max_frames: of one video; more are not counted. The default is four hours at 30 fps.
    memory_bytes: address space of a decode process (RLIMIT_AS), besides the frames that it hands over.
    clips_per_process: windows after which a decode process is replaced, against leaks in native code.
    """

    timeout_seconds: float = 60.0
    seconds_per_frame: float = 0.1
    max_pixels: int = 8192 * 4320
    max_frames: int = 432_000
    memory_bytes: int = 4 << 30
    clips_per_process: int = 100_000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")

    def probe_seconds(self, source: MediaSource) -> float:
        """Time allowed to probe a source, which may take reading all of it."""
        return self.timeout_seconds + source.size_bytes / _SLOWEST_BYTES_PER_SECOND

    def decode_seconds(self, request: DecodeRequest) -> float:
        """Time allowed for all windows of a request together: decoding runs from the first frame to the last wanted."""
        last = max((window.start + window.num_frames for window in request.windows), default=0)
        grid = request.grid
        frames = last * grid.frame_step if grid.fps is None else last / float(grid.fps) * _HIGHEST_SOURCE_FPS
        return self.probe_seconds(request.source) + self.seconds_per_frame * min(frames, self.max_frames)
