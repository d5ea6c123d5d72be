"""Streams: the bits of the whole clip's latents, however its frames arrive; a state that is small and can be saved."""

import io
import threading

import pytest
import torch

from models import streamed
from models.pixels import to_pixels
from models.spec import EncoderCard, Geometry, GeometryError, Normaliser, Posterior
from models.streamed import ChunkedEncoder
from tests.fakes import FakeEncoder
from tests.narrow import BACKBONES, difference_std, native_encoder, random_frames, random_model

STREAM_TOLERANCE_STD = 1e-5
CHUNK_FRAMES = 8
MODES = sorted(name for name in BACKBONES if name != "causal-8x32x32")


@pytest.fixture(scope="module", params=MODES)
def model(request):
    return random_model(BACKBONES[request.param])


@pytest.fixture(scope="module")
def encoder(model):
    return native_encoder(model)


def joined(posteriors):
    posteriors = [posterior for posterior in posteriors if posterior is not None]
    return tuple(torch.cat([getattr(p, name) for p in posteriors], dim=2) for name in ("mean", "logvar"))


def push_all(stream, clip, sizes, axis=1):
    """What a stream gives for a clip that comes in pieces of those sizes, over and over; without the flush."""
    outputs, start = [], 0
    while start < clip.shape[axis]:
        size = min(sizes[len(outputs) % len(sizes)], clip.shape[axis] - start)
        outputs.append(stream.push(clip.narrow(axis, start, size)))
        start += size
    return outputs


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_bytes(value):
    """The memory that a state keeps alive."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return sum(map(state_bytes, values))


@pytest.mark.parametrize("chunk_frames", [4, 8, 20])
def test_a_stream_equals_the_whole_clip(model, encoder, chunk_frames):
    frames = random_frames(29, batch=2)
    whole = model.encode(to_pixels(frames, "cpu"))
    stream = encoder.encode_stream(chunk_frames)
    mean, logvar = joined([*push_all(stream, frames, [3, 11, 1]), stream.flush()])
    assert mean.dtype == torch.float32
    assert difference_std(mean, whole.mean) <= STREAM_TOLERANCE_STD
    assert difference_std(logvar, whole.logvar) <= STREAM_TOLERANCE_STD


@pytest.mark.parametrize("sizes", [[1], [2, 7], [CHUNK_FRAMES], [1, CHUNK_FRAMES], [1000]])
def test_bits_do_not_depend_on_how_frames_arrive(encoder, sizes):
    frames = random_frames(21)
    wanted = encoder.encode(frames, CHUNK_FRAMES)
    stream = encoder.encode_stream(CHUNK_FRAMES)
    mean, logvar = joined([*push_all(stream, frames, sizes), stream.flush()])
    assert torch.equal(mean, wanted.mean)
    assert torch.equal(logvar, wanted.logvar)


def test_bits_do_not_depend_on_the_length_of_the_clip(encoder):
    frames = random_frames(37)
    longest = encoder.encode(frames).mean
    for num_frames in (1, 5, 9, 13, 33):
        mean = encoder.encode(frames[:, :num_frames]).mean
        assert torch.equal(mean, longest[:, :, : mean.shape[2]])


@pytest.mark.parametrize("cut", [1, 6, 9, 14])
def test_bits_do_not_depend_on_where_a_run_was_restarted(model, encoder, cut):
    frames = random_frames(21)
    first = encoder.encode_stream()
    outputs = [first.push(frames[:, :cut])]
    state = saved_and_loaded(first.state)
    first.push(frames[:, cut:])  # what goes on after a save does not reach it
    elsewhere = native_encoder(random_model(model.config.backbone)).encode_stream(state=state)
    outputs += [elsewhere.push(frames[:, cut:]), elsewhere.flush()]
    assert torch.equal(joined(outputs)[0], encoder.encode(frames).mean)


def test_the_state_of_a_long_clip_is_that_of_a_short_one(encoder):
    frames = random_frames(1025, height=8, width=8)
    stream = encoder.encode_stream()
    stream.push(frames[:, :17])
    short = state_bytes(stream.state)
    push_all(stream, frames[:, 17:], [96])
    assert stream.state["num_frames"] == 1025
    assert state_bytes(stream.state) == short
    stream.push(frames[:, : CHUNK_FRAMES - 1])
    frame_bytes = frames[:, 0].numel()
    assert state_bytes(stream.state) == short + (CHUNK_FRAMES - 1) * frame_bytes


def test_nothing_comes_out_before_a_chunk_is_full(encoder):
    frames = random_frames(13)
    stream = encoder.encode_stream(CHUNK_FRAMES)
    assert stream.push(frames[:, :1]).mean.shape[2] == 1
    assert stream.push(frames[:, 1:8]) is None
    stride = encoder.card.geometry.temporal_stride
    assert stream.push(frames[:, 8:9]).mean.shape[2] == CHUNK_FRAMES // stride
    assert stream.push(frames[:, 9:]) is None
    assert stream.flush().mean.shape[2] == 4 // stride


def test_after_a_flush_another_clip_begins(encoder):
    frames, others = random_frames(17), random_frames(17).flip(1)
    stream = encoder.encode_stream()
    push_all(stream, frames, [5])
    assert stream.flush() is None  # 1 + 2 * 8 frames leave none waiting
    outputs = [stream.push(others), stream.flush()]
    assert torch.equal(joined(outputs)[0], encoder.encode(others).mean)
    with pytest.raises(GeometryError, match="0 frames are not"):
        stream.flush()


def test_a_clip_off_the_grid_is_refused_at_its_end_and_can_still_be_completed():
    encoder = native_encoder(random_model(BACKBONES["causal"]))
    frames = random_frames(13)
    stream = encoder.encode_stream()
    outputs = [stream.push(frames[:, :12])]
    with pytest.raises(GeometryError, match=r"12 frames are not 1\+4k: use 9 or 13"):
        stream.flush()
    outputs += [stream.push(frames[:, 12:]), stream.flush()]
    assert torch.equal(joined(outputs)[0], encoder.encode(frames).mean)


def test_a_push_that_fails_changes_nothing():
    encoder = native_encoder(random_model(BACKBONES["causal"]))
    frames = random_frames(13, batch=2)
    stream = encoder.encode_stream()
    outputs = [stream.push(frames[:, :6])]
    for wrong, message in (
        (frames[:1], "the clip began with frames like"),
        (frames[:, :, :, :8], "the clip began with frames like"),
        (frames[:, :, :, :7], "width 7 is not a multiple of 8"),
        (frames.float(), "frames are uint8"),
        (frames[0], "frames are uint8"),
        (frames[:, :0], "frames are uint8"),
    ):
        before = stream.state
        with pytest.raises(GeometryError, match=message):
            stream.push(wrong)
        assert stream.state is before
    outputs += [stream.push(frames[:, 6:]), stream.flush()]
    assert torch.equal(joined(outputs)[0], encoder.encode(frames).mean)


def test_a_backend_that_fails_leaves_the_stream_as_it_was():
    model = random_model(BACKBONES["causal"])
    encoder = native_encoder(model)
    frames = random_frames(17)
    stream = encoder.encode_stream()
    outputs = [stream.push(frames[:, :3])]
    hook = model.encoder.conv_out.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("on purpose")))
    with pytest.raises(MemoryError):
        stream.push(frames[:, 3:])
    hook.remove()
    outputs += [stream.push(frames[:, 3:]), stream.flush()]
    assert torch.equal(joined(outputs)[0], encoder.encode(frames).mean)


def test_chunks_and_states_that_do_not_fit_are_refused():
    encoder = native_encoder(random_model(BACKBONES["causal"]))
    for chunk_frames in (0, 6, -4):
        with pytest.raises(GeometryError, match=f"chunk_frames {chunk_frames} is not a multiple of 4"):
            encoder.encode_stream(chunk_frames)
    stream = encoder.encode_stream(12)
    stream.push(random_frames(5))
    with pytest.raises(GeometryError, match="chunk_frames 8: the state is of chunks of 12"):
        encoder.encode_stream(8, stream.state)
    assert encoder.encode_stream(12, stream.state).state is stream.state


@pytest.mark.parametrize("sizes", [[1], [2, 3], [1, 2], [100]])
def test_a_decode_stream_gives_the_bits_of_the_whole_latent(model, encoder, sizes):
    latents = encoder.encode(random_frames(21, batch=2)).mean
    wanted = encoder.decode(latents)
    whole = (model.decode(latents).clamp(-1, 1) + 1) * 127.5
    assert (wanted.permute(0, 4, 1, 2, 3) - whole).abs().max() <= 0.501
    stream = encoder.decode_stream()
    frames = [*push_all(stream, latents, sizes, axis=2), stream.flush()]
    assert torch.equal(torch.cat([piece for piece in frames if piece is not None], dim=1), wanted)


def test_decoded_bits_depend_neither_on_length_nor_on_a_restart(encoder):
    latents = encoder.encode(random_frames(21)).mean
    wanted = encoder.decode(latents)
    shorter = encoder.decode(latents[:, :, :-1])
    assert torch.equal(shorter, wanted[:, : shorter.shape[1]])
    stream = encoder.decode_stream()
    pieces = [stream.push(latents[:, :, :4])]
    stream = encoder.decode_stream(saved_and_loaded(stream.state))
    pieces += [stream.push(latents[:, :, 4:]), stream.flush()]
    assert torch.equal(torch.cat([piece for piece in pieces if piece is not None], dim=1), wanted)


def test_latents_that_do_not_fit_are_refused():
    encoder = native_encoder(random_model(BACKBONES["causal"]))
    stream = encoder.decode_stream()
    with pytest.raises(GeometryError, match="no latent frame to decode"):
        stream.flush()
    for latents in (torch.zeros(1, 3, 2, 1, 1), torch.zeros(4, 2, 1, 1), torch.zeros(1, 4, 0, 1, 1)):
        with pytest.raises(GeometryError, match="latents are B 4 t h w"):
            stream.push(latents)
        with pytest.raises(GeometryError, match="latents are B 4 t h w"):
            encoder.decode(latents)


def test_a_backend_that_decodes_whole_latents_has_no_decode_stream():
    model = random_model(BACKBONES["causal"])

    class WholeDecoding:
        one_at_a_time = False

        def encode_chunk(self, pixels, state):
            return model.encode_chunk(pixels, state or {})

        def decode(self, latents):
            yield from model.decode(latents).split(5, dim=2)

        def to(self, device, dtype):
            model.to(device, dtype)

    geometry = model.config.geometry
    card = EncoderCard("whole", "whole", geometry, Normaliser((0.0,) * 4, (1.0,) * 4), "0" * 64, posterior=True)
    encoder = ChunkedEncoder(card, WholeDecoding(), "cpu", torch.float32)
    latents = encoder.encode(random_frames(9)).mean
    assert encoder.decode(latents).shape == (1, 9, 8, 16, 3)
    with pytest.raises(GeometryError, match="whole decodes whole latents only"):
        encoder.decode_stream()


def test_two_threads_stream_through_one_encoder(encoder):
    clips = [random_frames(29), random_frames(29).flip(1)]
    wanted = [encoder.encode(clip).mean for clip in clips]
    for _ in range(3):
        found = [None, None]
        barrier = threading.Barrier(2)

        def work(index, found=found, barrier=barrier):
            barrier.wait()
            stream = encoder.encode_stream()
            found[index] = joined([*push_all(stream, clips[index], [5]), stream.flush()])[0]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[index], wanted[index]) for index in range(2))


def test_the_fake_encoder_streams_as_it_encodes():
    encoder = FakeEncoder()
    frames = random_frames(25, batch=2)
    wanted = encoder.encode(frames)
    stream = encoder.encode_stream()
    mean, logvar = joined([*push_all(stream, frames, [7]), stream.flush()])
    assert torch.equal(mean, wanted.mean)
    assert torch.equal(logvar, wanted.logvar)
    assert isinstance(stream.push(frames[:, :1]), Posterior)


def test_a_whole_clip_goes_to_the_device_at_once(monkeypatch):
    class Anywhere:
        one_at_a_time = False

        def encode_chunk(self, pixels, state):
            assert pixels.device.type == "meta"
            return Posterior(torch.zeros(1, 4, max(1, pixels.shape[2] // 4), 1, 2), None), {}

        def to(self, device, dtype):
            pass

    arrived = []

    def watched(frames, *settings):
        arrived.append((frames.device.type, frames.shape[1]))
        return to_pixels(frames, *settings)

    monkeypatch.setattr(streamed, "to_pixels", watched)
    card = EncoderCard("a", "a", Geometry(4, 8, 4), Normaliser((0.0,), (1.0,)), "0" * 64, posterior=False)
    encoder = ChunkedEncoder(card, Anywhere(), "meta", torch.float32)
    assert encoder.encode(random_frames(21)).mean.shape == (1, 4, 6, 1, 2)
    assert arrived == [("meta", 1), ("meta", 8), ("meta", 8), ("meta", 8)]


def test_calls_run_beside_each_other_on_cpus_only():
    class Nowhere:
        one_at_a_time = False

        def to(self, device, dtype):
            pass

    card = EncoderCard("n", "n", Geometry(4, 8, 4), Normaliser((0.0,), (1.0,)), "0" * 64, posterior=True)
    devices = ("cpu", "cuda")
    assert [ChunkedEncoder(card, Nowhere(), device, torch.float32).one_at_a_time for device in devices] == [False, True]
