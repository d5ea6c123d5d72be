from __future__ import annotations

import copy
import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from pipeline.decode.records import ClipShape, DecodeRequest, Grid, MediaSource, Window
from pipeline.decode.wire import requests_from_json, requests_to_json

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


@given(st.lists(REQUESTS, max_size=3), st.data())
def test_requests_survive_the_wire(different: list[DecodeRequest], data: st.DataObject) -> None:
    requests = data.draw(st.lists(st.sampled_from(different), max_size=6)) if different else []
    assert list(requests_from_json(json.loads(json.dumps(requests_to_json(requests))))) == requests


@given(REQUESTS)
def test_a_request_on_the_wire_has_every_field_of_its_records(request_: DecodeRequest) -> None:
    fields = dataclasses.asdict(request_)
    fields["grid"]["fps"] = None if request_.grid.fps is None else str(request_.grid.fps)
    fields["windows"] = list(fields["windows"])
    (group,) = requests_to_json([request_])
    ((group["source"], windows),) = group.pop("media")
    group["windows"] = [{"start": start, "num_frames": num_frames} for start, num_frames in windows]
    assert group == fields


@given(REQUESTS, REQUESTS)
def test_what_neighbours_share_goes_once(first: DecodeRequest, second: DecodeRequest) -> None:
    like_first = dataclasses.replace(second, grid=first.grid, shape=first.shape, decoder=first.decoder)
    assert len(requests_to_json([first, like_first, first])) == 1
    other = dataclasses.replace(first, shape=dataclasses.replace(first.shape, height=first.shape.height + 1))
    assert len(requests_to_json([first, other, first])) == 3


@given(REQUESTS)
def test_the_wire_holds_no_part_of_the_request(request_: DecodeRequest) -> None:
    before = copy.deepcopy(request_)
    (group,) = requests_to_json([request_])
    ((source, windows),) = group["media"]
    for part in (source, group["grid"], group["shape"], windows):
        part.clear()
    assert request_ == before
