"""What may be left out on the way to a wanted frame, by packets' time stamps alone."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.decode.proof import NotExactError, _Due


@dataclasses.dataclass
class Packet:
    pts: int | None
    dts: int | None
    duration: int | None = 1


def before(index, pts):
    return index <= 100


def due_after(*fed, index=0):
    due = _Due(index)
    for pts in fed:
        due.add(pts)
    return due


def come(due, pts):
    """The time stamp that was due, and its index, when this one's frame comes."""
    due.drop_left_out(pts)
    return due.first, due.pop()


def test_a_frame_before_the_wanted_one_can_be_spared_once_its_index_is_certain():
    due = due_after(4, 2, index=10)
    seen = []
    assert due.can_spare(Packet(1, 0), lambda index, pts: seen.append((index, pts)) or True)
    assert seen == [(11, 2)]  # its successor, and when that is shown at the earliest
    assert not due.can_spare(Packet(1, -1), before)  # another may come that is shown at 0
    assert not due.can_spare(Packet(1, 0, None), before)
    assert due.can_spare(Packet(1, 1, None), before)
    assert not due.can_spare(Packet(1, None), before)
    assert not due.can_spare(Packet(None, 1), before)
    assert not due.can_spare(Packet(2, 2), before)  # which of the two would be left out?


def test_the_wanted_frame_itself_is_never_spared():
    due = due_after(4, 2, index=99)
    assert due.can_spare(Packet(1, 1), before)  # 99, before 100
    due.add(0)
    assert not due.can_spare(Packet(1, 1), before)  # 100
    assert not due_after(4, index=5).can_spare(Packet(5, 5), before)  # nothing is known to be shown after it


def test_no_frame_is_spared_that_comes_later_than_the_decoder_waits():
    """A stream may not tell how many frames are to be held back: FFmpeg learns it from those that come late."""
    due = due_after(4)
    come(due, 4)  # a decoder that gave it at once
    due.add(8)
    assert due.can_spare(Packet(6, 6), before)
    due.add(7)
    assert due.can_spare(Packet(6, 6), before)
    come(due, 7)
    due.leave_out(7)
    assert not due.can_spare(Packet(6, 6), before)  # two are shown later, one is held back


def test_no_frame_is_spared_that_comes_after_one_that_is_shown_later():
    due = due_after(4)
    come(due, 4)  # too early
    for pts in (8, 6):
        due.add(pts)
    assert not due.can_spare(Packet(3, 3), before)  # the decoder would lose it, and that must be seen
    assert due.can_spare(Packet(5, 5), before)


def test_frames_that_are_left_out_count():
    due = due_after(0, 4, index=20)
    assert come(due, 0) == (0, 20)
    due.leave_out(1)
    due.leave_out(2)
    assert come(due, 4) == (4, 23)
    assert due.first is None


def test_a_packet_that_comes_too_late_for_the_count_is_found_out():
    due = due_after(0, 4)
    come(due, 0)
    due.leave_out(2)
    due.add(1)  # shown before the one whose index was thought certain
    assert come(due, 1) == (1, 1)
    with pytest.raises(NotExactError):
        due.drop_left_out(4)
