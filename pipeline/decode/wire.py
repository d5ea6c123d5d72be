"""Decode requests and outcomes as JSON, for the pipe between a decode process and its owner.

In:   records and LatentmillErrors.
Out:  dictionaries of plain JSON values, and back; floats keep every bit, frames travel elsewhere.
Cost: about 20 bytes per frame, for its pts.
Errors: KeyError for a dictionary that the other side did not make.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from pipeline import errors
from pipeline.decode.records import (
    ClipShape,
    DecodedClip,
    DecodeOutcome,
    DecodeRequest,
    Grid,
    MediaSource,
    Window,
)

Json = dict[str, Any]


def requests_to_json(requests: Sequence[DecodeRequest]) -> list[Json]:
    """All of the requests, in order; what neighbours share goes once."""
    return [
        {
            "grid": {"fps": None if grid.fps is None else str(grid.fps), "frame_step": grid.frame_step},
            "shape": dict(vars(shape)),
            "decoder": decoder,
            "media": [
                [dict(vars(one.source)), [(window.start, window.num_frames) for window in one.windows]] for one in alike
            ],
        }
        for (grid, shape, decoder), alike in itertools.groupby(requests, lambda one: (one.grid, one.shape, one.decoder))
    ]


def requests_from_json(groups: Sequence[Json]) -> Iterator[DecodeRequest]:
    """Undo `requests_to_json`."""
    for group in groups:
        fps = group["grid"]["fps"]
        grid = Grid(None if fps is None else Fraction(fps), group["grid"]["frame_step"])
        shape = ClipShape(**group["shape"])
        for source, windows in group["media"]:
            wanted = tuple(Window(*window) for window in windows)
            yield DecodeRequest(MediaSource(**source), grid, wanted, shape, group["decoder"])


def outcome_to_json(outcome: DecodeOutcome) -> Json:
    """A clip without its frames, or an error."""
    if isinstance(outcome, errors.DecodeError):
        return error_to_json(outcome)
    return {"pts_seconds": outcome.pts_seconds.tolist(), "decoder": outcome.decoder}


def outcomes_from_json(reply: Json, frames: Sequence[np.ndarray]) -> tuple[DecodeOutcome, ...]:
    """The outcomes of a reply; `frames` has every window's."""
    outcomes = reply["outcomes"]
    cost = [reply[name] / len(outcomes) for name in ("cpu_seconds", "wait_seconds")]
    return tuple(
        _decode_error(fields)
        if "error" in fields
        else DecodedClip(pictures, np.array(fields["pts_seconds"], np.float64), fields["decoder"], *cost)
        for fields, pictures in zip(outcomes, frames, strict=True)
    )


def error_to_json(error: errors.LatentmillError) -> Json:
    """An error's type, and its reason and detail where it has them."""
    if isinstance(error, errors.SampleError):
        return {"error": type(error).__name__, "arguments": [error.reason, error.detail]}
    return {"error": type(error).__name__, "arguments": [str(error)]}


def error_from_json(fields: Json) -> errors.LatentmillError:
    """Undo `error_to_json`."""
    error_type: type[errors.LatentmillError] = getattr(errors, fields["error"])
    return error_type(*fields["arguments"])


def _decode_error(fields: Json) -> errors.DecodeError:
    reason, detail = fields["arguments"]
    return errors.DecodeError(reason, detail)
