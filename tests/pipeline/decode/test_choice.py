"""What `--decoder auto` makes of the table."""

from __future__ import annotations

import sys

import pytest

from pipeline.decode import backend as backend_module
from pipeline.decode import choice
from pipeline.decode.backend import decode_windows
from pipeline.decode.choice import Answer, Row, Table, backend_names, checked_in_table
from pipeline.decode.decord_backend import DecordBackend
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.pyav import PyAVBackend
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, Window
from pipeline.errors import DecodeError, UsageError
from tests.clips import numbered_image, numbered_video, read_number, stored

LIMITS = DecodeLimits()


def table(*rows):
    """Rows of (codec, pyav's answer, decord's answer), in mp4."""
    return Table(
        {},
        tuple(
            Row("mp4", codec, f"row {i}", broken=False, answers={"pyav": pyav, "decord": decord})
            for i, (codec, pyav, decord) in enumerate(rows)
        ),
    )


def exact(speed):
    return Answer("exact", "", speed, 50)


WRONG, DECLINED, CRASHED = Answer("wrong", "cut"), Answer("unsupported", "all"), Answer("crash", "cut")


@pytest.mark.parametrize(
    ("rows", "order"),
    [
        ([("h264", exact(500), exact(200))], ("pyav", "decord")),
        ([("h264", exact(200), exact(500))], ("decord", "pyav")),
        ([("h264", exact(200), exact(200))], ("decord", "pyav")),
        ([("h264", exact(200), exact(500)), ("h264", exact(200), WRONG)], ("pyav",)),
        ([("h264", exact(200), exact(500)), ("h264", exact(200), CRASHED)], ("pyav",)),
        ([("h264", exact(200), exact(500)), ("h264", exact(200), DECLINED)], ("decord", "pyav")),
        ([("h264", exact(200), exact(500)), ("hevc", exact(200), WRONG)], ("decord", "pyav")),
        ([("h264", exact(200), DECLINED)], ("pyav",)),
        ([("h264", WRONG, DECLINED)], ("pyav",)),
        ([("h264", WRONG, exact(20))], ("decord",)),
        ([], ("pyav",)),
    ],
)
def test_the_fastest_proven_back_end_comes_first(rows, order):
    assert table(*rows).order("mp4", "h264") == order


def test_one_leader_everywhere_needs_no_look_at_the_video():
    assert table(("h264", exact(5), exact(2)), ("mjpeg", exact(5), DECLINED)).leader == "pyav"
    assert table(("h264", exact(5), exact(2)), ("mjpeg", exact(5), exact(9))).leader is None


def test_a_table_survives_its_file():
    original = table(("h264", exact(5), WRONG), ("mjpeg", exact(5), DECLINED))
    assert Table.from_json(original.to_json()) == original


def test_only_what_every_installation_has_is_ranked():
    """Else the store would hang on what else is installed."""
    for row in checked_in_table().rows:
        assert set(checked_in_table().order(row.container, row.codec)) <= {"pyav", "decord"}


def test_a_named_decoder_is_the_only_one(tmp_path):
    source = stored(tmp_path, numbered_video(3))
    assert list(backend_names(source, "decord", LIMITS)) == ["decord"]
    assert len(list(backend_names(stored(tmp_path, numbered_image(), kind="image"), "auto", LIMITS))) == 1


def use_table(monkeypatch, *rows):
    monkeypatch.setattr(choice, "checked_in_table", lambda: table(*rows))


def decode(source, *windows):
    request = DecodeRequest(source, Grid(), tuple(Window(*window) for window in windows), ClipShape(64, 64), "auto")
    return decode_windows(request, LIMITS)


def test_auto_takes_the_first_of_the_videos_own_kind(tmp_path, monkeypatch):
    use_table(monkeypatch, ("h264", exact(1), exact(2)), ("vp9", exact(2), exact(1)))
    (clip,) = decode(stored(tmp_path, numbered_video(6)), (2, 3))
    assert ([read_number(frame) for frame in clip.frames], clip.decoder) == ([2, 3, 4], "decord")
    (clip,) = decode(stored(tmp_path, numbered_video(6, codec="libvpx-vp9")), (2, 3))
    assert ([read_number(frame) for frame in clip.frames], clip.decoder) == ([2, 3, 4], "pyav")


def breaking(after, reason="decode_error"):
    """PyAV's frames up to an error."""

    def frames(self, source, shape, limits, *_):
        for frame in whole(self, source, shape, limits):
            if frame.index == after:
                raise backend_module.damage(source, reason, "made up")
            yield frame

    whole = PyAVBackend.frames
    return frames


def break_pyav(monkeypatch, after, reason="decode_error"):
    broken = breaking(after, reason)
    monkeypatch.setattr(PyAVBackend, "frames", broken)
    monkeypatch.setattr(PyAVBackend, "wanted_frames", broken)


def test_windows_that_the_first_cannot_decode_go_to_the_next(tmp_path, monkeypatch):
    use_table(monkeypatch, ("h264", exact(2), exact(1)))
    break_pyav(monkeypatch, after=5)
    early, late, beyond = decode(stored(tmp_path, numbered_video(12)), (1, 3), (6, 4), (11, 4))
    assert ([read_number(frame) for frame in early.frames], early.decoder) == ([1, 2, 3], "pyav")
    assert ([read_number(frame) for frame in late.frames], late.decoder) == ([6, 7, 8, 9], "decord")
    assert isinstance(beyond, DecodeError)


@pytest.mark.parametrize("reason", ["corrupt_frame", "lost_packets"])
def test_damage_that_was_seen_is_not_given_to_one_who_may_not_see_it(reason, tmp_path, monkeypatch):
    use_table(monkeypatch, ("h264", exact(2), exact(1)))
    break_pyav(monkeypatch, 5, reason)
    early, late = decode(stored(tmp_path, numbered_video(12)), (1, 3), (6, 4))
    assert isinstance(early, DecodedClip)
    assert str(late) == f"{reason}: clip: made up"


def test_what_nobody_can_decode_has_the_first_ones_error(tmp_path, monkeypatch):
    use_table(monkeypatch, ("h264", exact(2), exact(1)))
    break_pyav(monkeypatch, after=2)
    monkeypatch.setattr(DecordBackend, "frames", breaking(0))
    early, late = decode(stored(tmp_path, numbered_video(12)), (0, 2), (6, 4))
    assert isinstance(early, DecodedClip)
    assert str(late) == "decode_error: clip: made up"


def test_the_next_one_must_be_proven(tmp_path, monkeypatch):
    use_table(monkeypatch, ("h264", exact(2), exact(1)), ("h264", exact(2), WRONG))
    break_pyav(monkeypatch, after=2)
    (late,) = decode(stored(tmp_path, numbered_video(12)), (6, 4))
    assert str(late) == "decode_error: clip: made up"


def test_torchcodec_missing_is_the_users_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    request = DecodeRequest(
        stored(tmp_path, numbered_video(3)), Grid(), (Window(0, 1),), ClipShape(64, 64), "torchcodec"
    )
    with pytest.raises(UsageError, match=r"latentmill\[torchcodec\]"):
        decode_windows(request, LIMITS)
