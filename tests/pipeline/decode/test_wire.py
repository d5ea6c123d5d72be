from __future__ import annotations

import copy
import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from pipeline.decode.records import ClipShape, DecodeRequest, Grid, MediaSource, Window
from pipeline.decode.wire import request_from_json, request_to_json

NATURAL = st.integers(0, 2**63)
POSITIVE = st.integers(1, 2**31)
TEXT = st.text(st.characters(codec="utf-8"))
GRIDS = st.one_of(
    st.builds(Grid, st.fractions(min_value="1/1000000", max_value=1000)),
    st.builds(Grid, st.none(), POSITIVE),
)
REQUESTS = st.builds(
    DecodeRequest,
    source=st.builds(MediaSource, TEXT, NATURAL, NATURAL, st.sampled_from(["video", "image"]), TEXT),
    grid=GRIDS,
    windows=st.lists(st.builds(Window, NATURAL, POSITIVE), max_size=4).map(tuple),
    shape=st.builds(
        ClipShape, POSITIVE, POSITIVE, st.sampled_from(["crop", "stretch"]), st.sampled_from(["area", "bicubic"])
    ),
    decoder=st.sampled_from(["auto", "pyav", "decord", "torchcodec"]),
)


@given(REQUESTS)
def test_requests_survive_the_wire(request_: DecodeRequest) -> None:
    assert request_from_json(json.loads(json.dumps(request_to_json(request_)))) == request_


@given(REQUESTS)
def test_a_request_on_the_wire_has_every_field_of_its_records(request_: DecodeRequest) -> None:
    fields = dataclasses.asdict(request_)
    fields["grid"]["fps"] = None if request_.grid.fps is None else str(request_.grid.fps)
    assert json.dumps(request_to_json(request_)) == json.dumps(fields)


@given(REQUESTS)
def test_the_wire_holds_no_part_of_the_request(request_: DecodeRequest) -> None:
    before = copy.deepcopy(request_)
    fields = request_to_json(request_)
    for part in (fields["source"], fields["grid"], fields["shape"], *fields["windows"]):
        part.clear()
    assert request_ == before
