"""What the Ray engine adds to the engine that every other test uses. (Whole jobs on Ray: tests/end_to_end.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, MediaSource, Window
from pipeline.errors import DecodeError, ShardError
from tests.clips import numbered_video, read_number, stored

pytestmark = pytest.mark.ray


def request(source: MediaSource, *windows: Window) -> DecodeRequest:
    return DecodeRequest(source, Grid(), windows, ClipShape(96, 96))


def test_a_decode_task_gives_frames_and_errors_as_a_process_does(ray_cluster: None, tmp_path: Path) -> None:
    from jobs.ray_engine import RayDecoders

    decoders = RayDecoders(DecodeLimits())
    video = stored(tmp_path, numbered_video(num_frames=20))
    pending = decoders.submit(request(video, Window(11, 2), Window(3, 1), Window(19, 4)))
    late, early, beyond = pending.result()
    assert isinstance(late, DecodedClip)
    assert isinstance(early, DecodedClip)
    assert [read_number(frame) for frame in (*late.frames, *early.frames)] == [11, 12, 3]
    assert isinstance(beyond, DecodeError)
    assert (beyond.reason, beyond.detail) == ("past_end", "clip: positions 19 to 22 reach past the video's end")


def test_errors_of_the_input_cross_the_cluster_as_themselves(ray_cluster: None, tmp_path: Path) -> None:
    from jobs.ray_engine import RayDecoders

    missing = MediaSource(str(tmp_path / "gone.tar"), 0, 100, "video", "key")
    with pytest.raises(ShardError, match=r"cannot read shard .*gone\.tar") as caught:
        RayDecoders(DecodeLimits()).submit(request(missing, Window(0, 1))).result()
    assert type(caught.value) is ShardError
