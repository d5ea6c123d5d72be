"""One way to decode, in a process of its own, so that its time and its memory are its own.

In:   JSON lines on stdin: {"method", "path", "windows": [[start, frames], ...], "side"}; see METHODS. The same is done
      again until "least_seconds" are over.
Out:  JSON lines on stdout: {"frames", "wall_seconds", "cpu_seconds"} of one time, "peak_mib"; or {"error"}.
Cost: what is measured.
Errors: a LatentmillError, an ImportError or a library's error becomes {"error"}.

Every method decodes on one thread and gives uint8 T H W 3 at side x side.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pipeline.decode.backend import decode_pieces, decode_windows
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, DecoderName, Grid, MediaSource, Window
from pipeline.errors import LatentmillError

Windows = Sequence[tuple[int, int]]
_PIECE_FRAMES = 32


def request_of(path: str, windows: Windows, side: int, decoder: DecoderName = "auto") -> DecodeRequest:
    """Windows of a file's native frames, cropped to a square."""
    source = MediaSource(path, 0, Path(path).stat().st_size, "video", Path(path).name)
    return DecodeRequest(source, Grid(), tuple(Window(*window) for window in windows), ClipShape(side, side), decoder)


def _back_end(name: DecoderName) -> Callable[[str, Windows, int], int]:
    def decode(path: str, windows: Windows, side: int) -> int:
        outcomes = decode_windows(request_of(path, windows, side, name), DecodeLimits())
        return sum(len(_clip(outcome).frames) for outcome in outcomes)

    return decode


def _clip(outcome: object) -> DecodedClip:
    if isinstance(outcome, LatentmillError):
        raise outcome
    assert isinstance(outcome, DecodedClip)
    return outcome


def _stream(path: str, windows: Windows, side: int) -> int:
    """The windows in pieces, each dropped when the next one comes."""
    requests = [request_of(path, [window], side, "pyav") for window in windows]
    pieces = (piece for request in requests for piece in decode_pieces(request, DecodeLimits(), _PIECE_FRAMES))
    return sum(len(piece.frames) for piece in pieces)


def _decord_get_batch(path: str, windows: Windows, side: int) -> int:
    """What people write: decord in the main process, then resize with torch."""
    import decord

    indices = [start + k for start, count in windows for k in range(count)]
    try:
        frames = decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()
    except decord.DECORDError as error:
        raise RuntimeError("decord cannot read it") from error
    return _resized(frames, side)


def _pyav_then_torch(path: str, windows: Windows, side: int) -> int:
    """What people write: all frames of the video as RGB, then pick, then resize with torch."""
    import av
    from av.video.reformatter import VideoReformatter

    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        scaler = VideoReformatter()
        scaled = (scaler.reformat(frame, format="rgb24", threads=1) for frame in container.decode(video=0))
        frames = [frame.to_ndarray() for frame in scaled]
    return _resized(np.stack([frames[start + k] for start, count in windows for k in range(count)]), side)


def _resized(frames: np.ndarray, side: int) -> int:
    import torch

    torch.set_num_threads(1)
    height, width = frames.shape[1:3]
    left = (width - height) // 2
    square = torch.from_numpy(frames[:, :, left : left + height]).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(square, (side, side), mode="bicubic", antialias=True)
    return len(small.clamp(0, 255).to(torch.uint8))


METHODS: dict[str, Callable[[str, Windows, int], int]] = {
    "auto": _back_end("auto"),
    "pyav": _back_end("pyav"),
    "decord": _back_end("decord"),
    "torchcodec": _back_end("torchcodec"),
    "loop: decord get_batch": _decord_get_batch,
    "loop: PyAV all, torch resize": _pyav_then_torch,
    "stream": _stream,
}


def _peak_mib() -> float:
    # Not ru_maxrss: a child takes that over from the process that started it.
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def measure(method: str, path: str, windows: Windows, side: int, least_seconds: float = 0.0) -> dict[str, float | str]:
    """Decode once, or until the time is over; the mean of one time."""
    began, cpu_began, times = time.perf_counter(), time.process_time(), 0
    while times == 0 or time.perf_counter() - began < least_seconds:
        try:
            frames = METHODS[method](path, windows, side)
        except (LatentmillError, ImportError, RuntimeError) as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
        times += 1
    wall, cpu = (time.perf_counter() - began) / times, (time.process_time() - cpu_began) / times
    return {"frames": frames, "wall_seconds": wall, "cpu_seconds": cpu, "peak_mib": _peak_mib()}


def main() -> None:
    """Serve measurements until stdin closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    for line in sys.stdin:
        print(json.dumps(measure(**json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
