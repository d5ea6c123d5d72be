"""Long clips on their way to the encoder: several are decoded at a time, piece by piece, within the window of bytes.

In:   decode requests of one window each.
Out:  to each clip's `hand_over`, in order: (piece or DecodeError, its bytes in the window), which it has to release.
Cost: a thread per clip under way; a piece of each, and what the window lets wait.
Errors: `hand_over` is told a LatentmillError that broke decoding; anything else goes to `on_fatal`.

A clip under way keeps its decoder while it waits for room in the window. So nothing that the encoder waits for may
queue behind it: whoever asks for whole windows as well first waits until no clip is under way, and the other way round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator

from pipeline.byte_window import ByteWindow
from pipeline.decode.backend import pieces_of
from pipeline.decode.records import DecodedClip, DecodeOutcome, DecodeRequest
from pipeline.decode_requests import Decoders
from pipeline.errors import DecodeError, LatentmillError

_CLIPS_AT_MOST = 8
_CHUNKS_PER_CLIP = 8  # of the window, for each clip under way
_PIECES_PER_CLIP = 4  # that its part of the window is cut into

HandOver = Callable[[DecodeOutcome | LatentmillError, int], bool]
"""Takes what came, and its bytes in the window; False when no more is wanted."""


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """How many clips are under way at a time, and in pieces of how many frames. Changes no latent."""

    clips: int
    piece_frames: int

    @classmethod
    def of(cls, window_bytes: int, frame_bytes: int, chunk_frames: int) -> StreamPlan:
        """As many clips as have room for some of the encoder's chunks each; pieces are whole chunks, at least one."""
        chunk_bytes = chunk_frames * frame_bytes
        clips = min(_CLIPS_AT_MOST, max(1, window_bytes // (_CHUNKS_PER_CLIP * chunk_bytes)))
        chunks = window_bytes // (clips * _PIECES_PER_CLIP * chunk_bytes)
        return cls(clips, max(1, chunks) * chunk_frames)


class ClipStreams:
    """The long clips under way."""

    def __init__(self, decoders: Decoders, window: ByteWindow, on_fatal: Callable[[BaseException], None]) -> None:
        self._decoders, self._window, self._on_fatal = decoders, window, on_fatal
        self._active = 0
        self._changed = threading.Condition()

    @property
    def active(self) -> int:
        """How many clips are not decoded to their end."""
        return self._active

    def start(self, request: DecodeRequest, plan: StreamPlan, hand_over: HandOver) -> None:
        """Begin a clip, once fewer than `plan.clips` are under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._active < plan.clips)
            self._active += 1
        arguments = (request, plan.piece_frames, hand_over)
        threading.Thread(target=self._run, args=arguments, name="latentmill-stream", daemon=True).start()

    def wait(self) -> None:
        """Wait until every clip is decoded to its end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._active)

    def _run(self, request: DecodeRequest, piece_frames: int, hand_over: HandOver) -> None:
        try:
            self._pump(request, piece_frames, hand_over)
        except LatentmillError as error:
            hand_over(error, 0)
        except BaseException as error:  # noqa: BLE001 (a dead thread must never look alive, whatever killed it)
            self._on_fatal(error)
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def _pump(self, request: DecodeRequest, piece_frames: int, hand_over: HandOver) -> None:
        (window,) = request.windows
        with contextlib.closing(self._decoders.stream(request, piece_frames)) as decoded:
            for piece in pieces_of(window, piece_frames):
                num_bytes = dataclasses.replace(request, windows=(piece,)).decoded_bytes
                # No variable holds the frames: they would stay until the next ones come.
                if not self._window.acquire(num_bytes) or not hand_over(self._next(decoded, num_bytes), num_bytes):
                    return

    def _next(self, decoded: Iterator[DecodedClip], num_bytes: int) -> DecodeOutcome:
        try:
            return next(decoded)
        except DecodeError as error:
            return error.with_traceback(None)  # whose frames hold the job, which keeps the error
        except BaseException:
            self._window.release(num_bytes)
            raise
