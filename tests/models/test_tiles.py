"""Tiles: a large picture in pieces gives the whole picture's latents, and no smaller halo would."""

import dataclasses

import pytest
import torch

from models.autoencoder import CausalAutoencoder
from models.bottlenecks.config import Vq
from models.config import ModelConfig, Pyramid, TopLevel
from models.pixels import to_pixels
from models.spec import GeometryError
from models.streamed import ChunkedEncoder
from models.tiles import Span, TiledBackend, halo, spans
from tests.narrow import BACKBONES, NARROW, difference_std, native_encoder, random_frames, random_model

TOLERANCE_STD = 1e-5
TILE = 4
ROWS, COLUMNS = 14, 13  # in latent positions: more than a tile and its halo, and no multiple of it


@pytest.fixture(scope="module", params=["causal", "chunk_causal", "frame"])
def model(request):
    return random_model(BACKBONES[request.param])


@pytest.fixture(scope="module")
def clip(model):
    return to_pixels(random_frames(5, height=8 * ROWS, width=8 * COLUMNS), "cpu")


def tiled_encoder(model, tile=TILE):
    card = native_encoder(model).card
    return ChunkedEncoder(card, TiledBackend(model, tile), "cpu", torch.float32)


def test_spans_cover_a_side_and_stay_inside():
    assert spans(10, 4, 3) == [Span(0, 0, 4, 7), Span(1, 4, 8, 10), Span(5, 8, 10, 10)]
    assert spans(3, 4, 3) == [Span(0, 0, 3, 3)]
    span = Span(5, 8, 10, 10)
    assert (span.outer(8), span.inner(2)) == (slice(40, 80), slice(6, 10))


def test_tiles_equal_the_whole_picture(model, clip):
    backend = TiledBackend(model, TILE)
    whole = model.encode(clip)
    posterior, states = backend.encode_chunk(clip, None)
    assert len(states) == 4 * 4
    assert difference_std(posterior.mean, whole.mean) <= TOLERANCE_STD
    assert difference_std(posterior.logvar, whole.logvar) <= TOLERANCE_STD
    assert (posterior.mean - whole.mean).abs().max() <= 1e-4 * whole.mean.std()  # at no single position either
    pixels, _ = backend.decode_chunk(whole.mean, None)
    wanted = model.decode(whole.mean)
    assert difference_std(pixels, wanted) <= TOLERANCE_STD
    assert (pixels - wanted).abs().max() <= 1e-4 * wanted.std()


def test_a_smaller_halo_would_not_do(model, clip):
    backend = TiledBackend(model, TILE)
    whole = model.encode(clip).mean
    backend.halos = {half: positions - 1 for half, positions in backend.halos.items()}
    assert difference_std(backend.encode_chunk(clip, None)[0].mean, whole) > TOLERANCE_STD
    assert difference_std(backend.decode_chunk(whole, None)[0], model.decode(whole)) > TOLERANCE_STD


def test_the_halo_follows_from_the_layers():
    # conv_in, two convolutions of the residual block and the down at 2 pixels, three at 4, two and conv_out at 8.
    assert halo(NARROW, "encoder") == -(-(4 * 2 + 3 * 4 + 3 * 8) // 8) == 6
    # The decoder's ups lie one level coarser: three at 2 pixels, three at 4, four at 8.
    assert halo(NARROW, "decoder") == -(-(3 * 2 + 3 * 4 + 4 * 8) // 8) == 7
    deeper = dataclasses.replace(NARROW, decoder=Pyramid(NARROW.decoder.channels, depth=2))
    assert halo(deeper, "decoder") == -(-(5 * 2 + 5 * 4 + 6 * 8) // 8)


def test_tiles_stream_in_time(model):
    frames = random_frames(9, height=8 * ROWS, width=8 * COLUMNS)
    encoder = tiled_encoder(model, tile=6)
    wanted = model.encode(to_pixels(frames, "cpu")).mean
    stream = encoder.encode_stream(4)
    parts = [stream.push(frames[:, :7]), stream.push(frames[:, 7:]), stream.flush()]
    mean = torch.cat([part.mean for part in parts if part is not None], dim=2)
    assert difference_std(mean, wanted) <= TOLERANCE_STD
    assert torch.equal(mean, encoder.encode(frames, 4).mean)
    assert (encoder.decode(wanted).int() - native_encoder(model).decode(wanted).int()).abs().max() <= 1


def test_tiles_in_bfloat16_are_made_of_the_codes_as_they_are():
    torch.manual_seed(0)
    model = CausalAutoencoder(ModelConfig(NARROW, Vq(codebook_size=32))).eval().requires_grad_(False)
    codes = {tuple(code) for code in model.bottleneck.codebook.codes().tolist()}
    encoder = ChunkedEncoder(native_encoder(model).card, TiledBackend(model, TILE), "cpu", torch.bfloat16)
    mean = encoder.encode(random_frames(1, height=8 * ROWS, width=8 * COLUMNS)).mean
    assert {tuple(position) for position in mean.movedim(1, -1).flatten(0, -2).tolist()} <= codes


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_attention_has_no_halo(half):
    with pytest.raises(ValueError, match="attention sees the whole picture"):
        halo(BACKBONES["causal-attention"], half)
    with pytest.raises(ValueError, match="attention sees the whole picture"):
        TiledBackend(random_model(BACKBONES["causal-attention"]), TILE)


def test_what_cannot_be_tiled_is_refused(clip):
    model = random_model(NARROW)
    with pytest.raises(ValueError, match="at least 1 latent position, got 0"):
        TiledBackend(model, 0)
    two_level = CausalAutoencoder(ModelConfig(NARROW, top=TopLevel(((1, 2),), (16,), 1, 4)))
    with pytest.raises(ValueError, match="a model of two levels has no exact tiles"):
        TiledBackend(two_level, TILE)
    with pytest.raises(GeometryError, match="width 98 is not a multiple of 8"):
        TiledBackend(model, TILE).encode_chunk(torch.zeros(1, 3, 1, 16, 98), None)
