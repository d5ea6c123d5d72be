"""The rehearsal encoder: the time of a GPU, latents of the promised shape, and a source that says what it means."""

from __future__ import annotations

import time

import pytest
import torch

from jobs.__main__ import main
from jobs.rehearsal import RehearsalEncoder, describe_rehearsal, is_rehearsal
from models.spec import GeometryError
from pipeline.errors import UsageError
from tests.fakes import write_numbered_shards

SOURCE = "rehearsal:4x8x8x16@2"


def test_it_takes_the_time_that_its_speed_says() -> None:
    frames = torch.zeros(2, 9, 64, 64, 3, dtype=torch.uint8)
    began = time.perf_counter()
    RehearsalEncoder(SOURCE).encode(frames)
    seconds = time.perf_counter() - began
    assert 0.95 < seconds / (2 * 9 * 64 * 64 / 2e6) < 2.0


def test_latents_have_the_promised_shape_and_decode_to_thumbnails() -> None:
    encoder = RehearsalEncoder("rehearsal:4x8x8x16@1000")
    frames = torch.randint(0, 256, (1, 9, 16, 24, 3), dtype=torch.uint8)
    posterior = encoder.encode(frames)
    assert tuple(posterior.mean.shape[1:]) == encoder.card.geometry.latent_shape(9, 16, 24)
    assert posterior.logvar is None
    decoded = encoder.decode(posterior.mean)
    assert decoded.shape == frames.shape
    assert torch.equal(decoded[0, ::4, ::8, ::8], frames[0, ::4, ::8, ::8])


@pytest.mark.parametrize(("channels", "colours"), [(1, [0, 0, 0]), (2, [0, 1, 0])])
def test_latents_of_fewer_channels_than_colours_decode_too(channels: int, colours: list[int]) -> None:
    encoder = RehearsalEncoder(f"rehearsal:4x8x8x{channels}@1000")
    frames = torch.randint(0, 256, (1, 9, 16, 24, 3), dtype=torch.uint8)
    decoded = encoder.decode(encoder.encode(frames).mean)
    assert torch.equal(decoded[0, ::4, ::8, ::8], frames[0, ::4, ::8, ::8][..., colours])


def test_clips_and_chunks_off_the_grid_are_refused() -> None:
    encoder = RehearsalEncoder(SOURCE)
    with pytest.raises(GeometryError, match="frames are not"):
        encoder.encode(torch.zeros(1, 8, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(GeometryError, match="not a multiple of 4"):
        encoder.encode(torch.zeros(1, 9, 16, 16, 3, dtype=torch.uint8), chunk_frames=6)


@pytest.mark.parametrize(
    "source", ["rehearsal:", "rehearsal:4x8x8x16", "rehearsal:4x8x16x16@5", "rehearsal:4x8x8x16@0"]
)
def test_a_source_that_says_too_little_is_refused(source: str) -> None:
    assert is_rehearsal(source)
    with pytest.raises(UsageError, match="rehearsal:TxHxWxC@MEGAPIXELS"):
        describe_rehearsal(source)


def test_another_speed_is_another_encoder() -> None:
    assert describe_rehearsal(SOURCE).fingerprint != describe_rehearsal("rehearsal:4x8x8x16@3").fingerprint


def test_a_whole_job_runs_with_it(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    shard = write_numbered_shards(tmp_path / "shards", 1, 2)[0]
    flags = ["--store", str(tmp_path / "store"), "--encoder", SOURCE, "--frames", "9", "--sizes", "32x32", "--local"]
    assert main(["encode", str(shard), *flags]) == 0
    assert "in 2 = 2 written" in capsys.readouterr().out
    assert main(["verify", "--store", str(tmp_path / "store"), "--share", "1"]) == 0
