"""Encoders that take a clip in chunks: the same latents as the plain whole clip, and nothing from the future."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("diffusers")

import torch

from models.encoders import describe, load_encoder
from models.pixels import to_pixels
from models.pretrained.directory import RULES
from models.spec import GeometryError
from tests.pretrained_models import STREAMED, Saved, difference_std

SELF_HELD = ("easyanimate", "ltx-0.9", "ltx-2", "vidtok-kl")  # modules that would keep a stream's state on themselves
STATEFUL = (*SELF_HELD, "qwen-image", "vidtok-2x8x8", "wan-2.1", "wan-2.2")


@pytest.fixture(scope="module", params=sorted(STREAMED))
def saved(request, tmp_path_factory):
    return Saved(STREAMED[request.param], tmp_path_factory.mktemp("encoder") / request.param)


def streaming(name, directory):
    """A backend of one class and pixels for it, leading frame first, in chunks of one stride."""
    saved = Saved(STREAMED[name], directory)
    backend = RULES[saved.case.class_name].streamed(copy.deepcopy(saved.module))
    pixels = to_pixels(saved.clip(latent_frames=5), "cpu")
    return backend, [pixels[:, :, :1], *pixels[:, :, 1:].split(saved.temporal, dim=2)]


@pytest.mark.parametrize("strides_per_chunk", [None, 1, 3])
def test_streamed_latents_are_the_whole_clips(saved, strides_per_chunk):
    clip = saved.clip(latent_frames=5)
    chunk_frames = strides_per_chunk and strides_per_chunk * saved.temporal
    posterior = saved.encoder.encode(clip, chunk_frames=chunk_frames)
    mean, logvar = saved.whole(clip)
    assert tuple(mean.shape[1:]) == saved.encoder.card.geometry.latent_shape(*clip.shape[1:4])
    assert difference_std(posterior.mean, mean) <= 1e-5
    assert posterior.mean.dtype == torch.float32
    assert (posterior.logvar is None) == (logvar is None) == (not saved.case.posterior)
    if logvar is not None:
        assert difference_std(posterior.logvar, logvar) <= 1e-5
        assert posterior.logvar.dtype == torch.float32


def test_the_card_is_as_the_family_says(saved):
    card, geometry = saved.encoder.card, saved.encoder.card.geometry
    assert (geometry.temporal_stride, geometry.spatial_stride) == saved.case.strides
    assert geometry.channels == saved.case.channels == len(card.normaliser.mean)
    assert geometry.leading_frame
    assert geometry.causality == "causal"
    assert card.posterior == saved.case.posterior
    assert card.pixel_range == (-1.0, 1.0)


def test_describing_agrees_with_loading(saved):
    assert describe(str(saved.directory)) == saved.encoder.card


def test_later_frames_leave_no_trace(saved):
    clip = saved.clip(latent_frames=4)
    changed = clip.clone()
    changed[:, 1 + saved.temporal :] = 7
    before, after = (saved.encoder.encode(one, chunk_frames=saved.temporal).mean for one in (clip, changed))
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_the_untouched_module_sees_no_future_either(saved):
    """Causality is the model's: not something that chunks happen to hide."""
    clip = saved.clip(latent_frames=4)
    changed = clip.clone()
    changed[:, 1 + saved.temporal :] = 7
    before, after = (saved.whole(one)[0] for one in (clip, changed))
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_bits_do_not_depend_on_the_clips_length(saved):
    clip = saved.clip(latent_frames=6)
    long = saved.encoder.encode(clip)
    for latent_frames in (1, 2, 4):
        short = saved.encoder.encode(clip[:, : 1 + saved.temporal * (latent_frames - 1)])
        # A filled chunk holds other late frames, but the arithmetic of the early ones is the same.
        assert torch.equal(short.mean, long.mean[:, :, :latent_frames])
        if saved.case.posterior:
            assert torch.equal(short.logvar, long.logvar[:, :, :latent_frames])


def test_a_batch_equals_its_clips(saved):
    clips = saved.clip(latent_frames=2, batch=2)
    one_by_one = torch.cat([saved.encoder.encode(clip[None]).mean for clip in clips])
    assert difference_std(saved.encoder.encode(clips).mean, one_by_one) <= 1e-5
    frames = saved.encoder.decode(one_by_one)
    frames_one_by_one = torch.cat([saved.encoder.decode(latent[None]) for latent in one_by_one])
    assert (frames.int() - frames_one_by_one.int()).abs().max() <= 1


def test_an_encoder_is_as_new_after_an_error_and_between_clips(saved):
    clip = saved.clip(latent_frames=2)
    first = saved.encoder.encode(clip).mean
    with pytest.raises(GeometryError):
        saved.encoder.encode(clip[:, :, :-1])
    saved.encoder.encode(255 - clip)
    assert torch.equal(saved.encoder.encode(clip).mean, first)


def test_a_stream_goes_on_elsewhere_with_the_same_bits(saved, tmp_path):
    """Frames that come a few at a time, and a state that went through a file to another copy of the model."""
    clip, chunk_frames, cut = saved.clip(latent_frames=5), saved.temporal, saved.temporal + 2
    here = saved.encoder.encode_stream(chunk_frames)
    parts = [here.push(clip[:, :cut])]
    torch.save(here.state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    there = load_encoder(str(saved.directory)).encode_stream(chunk_frames, state)
    parts += [there.push(clip[:, cut:]), there.flush()]
    mean = torch.cat([part.mean for part in parts if part is not None], dim=2)
    assert torch.equal(mean, saved.encoder.encode(clip, chunk_frames).mean)


def test_latents_are_decoded_as_they_come_or_only_whole(saved):
    latents = saved.encoder.encode(saved.clip(latent_frames=5)).mean
    if saved.case.class_name in {"AutoencoderVidTok", "AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video"}:
        with pytest.raises(GeometryError, match=f"{saved.case.class_name} decodes whole latents only"):
            saved.encoder.decode_stream()
        return
    stream = saved.encoder.decode_stream()
    parts = [stream.push(latents[:, :, :1]), stream.push(latents[:, :, 1:2]), stream.push(latents[:, :, 2:])]
    frames = torch.cat([part for part in [*parts, stream.flush()] if part is not None], dim=1)
    assert torch.equal(frames, saved.encoder.decode(latents))


@pytest.mark.parametrize("name", ["easyanimate", "qwen-image", "wan-2.1", "wan-2.2"])
def test_decoding_can_be_continued_twice_from_one_state(name, tmp_path):
    backend, _ = streaming(name, tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 4, 2, 2, generator=generator)
    with torch.inference_mode():
        _, state = backend.decode_chunk(latents[:, :, :1], None)
        once, after = backend.decode_chunk(latents[:, :, 1:2], state)
        backend.decode_chunk(latents[:, :, 2:], after)
        twice, _ = backend.decode_chunk(latents[:, :, 1:2], state)
    assert torch.equal(once, twice)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_stream_can_be_continued_twice_from_one_state(name, tmp_path):
    backend, chunks = streaming(name, tmp_path / name)
    with torch.inference_mode():
        _, state = backend.encode_chunk(chunks[0], None)
        once, _ = backend.encode_chunk(chunks[1], state)
        backend.encode_chunk(-chunks[0], None)  # another stream between
        twice, _ = backend.encode_chunk(chunks[1], state)
    assert torch.equal(once.mean, twice.mean)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_streams_state_does_not_grow(name, tmp_path):
    """Constant memory: the same bytes after one chunk, after four, and after one of many frames."""
    backend, chunks = streaming(name, tmp_path / name)

    def held_bytes(state):
        tensors = state.values() if isinstance(state, dict) else [past for past in state if past is not None]
        return sorted(past.untyped_storage().nbytes() for past in tensors)

    with torch.inference_mode():
        state, sizes = None, []
        for chunk in chunks:
            _, state = backend.encode_chunk(chunk, state)
            sizes.append(held_bytes(state))
        _, state = backend.encode_chunk(chunks[0], None)
        _, after_long = backend.encode_chunk(torch.cat(chunks[1:], dim=2), state)
    assert sizes[1] == sizes[-1] == held_bytes(after_long) != []


@pytest.mark.parametrize("name", SELF_HELD)
def test_a_call_that_fails_leaves_nothing_behind(name, tmp_path, monkeypatch):
    backend, chunks = streaming(name, tmp_path / name)
    with torch.inference_mode():
        wanted, _ = backend.encode_chunk(chunks[0], None)
        last = backend.vae.encoder.conv_out
        with monkeypatch.context() as patch:
            patch.setattr(last, "forward", None)
            with pytest.raises(TypeError):
                backend.encode_chunk(-chunks[0], None)
        if "ltx" in name:
            assert backend.tape.state == {}
        else:
            layers = backend.encoder_layers
            assert {getattr(layer, layers.attribute) for layer in layers.layers.values()} == {None}
        again, _ = backend.encode_chunk(chunks[0], None)
    assert torch.equal(again.mean, wanted.mean)


def test_only_models_that_keep_a_stream_in_their_layers_take_turns(saved):
    assert saved.encoder.one_at_a_time == (type(saved.module).__name__ in {"AutoencoderVidTok", "AutoencoderKLMagvit"})


def test_threads_may_share_an_encoder(saved):
    clips = [saved.clip(latent_frames=5), 255 - saved.clip(latent_frames=5)]
    serial = [saved.encoder.encode(clip, chunk_frames=saved.temporal).mean for clip in clips]
    serial_frames = [saved.encoder.decode(latents) for latents in serial]

    def work(index):
        latents = saved.encoder.encode(clips[index], chunk_frames=saved.temporal).mean
        return latents, saved.encoder.decode(latents)

    with ThreadPoolExecutor(2) as pool:
        for index, (latents, frames) in zip([0, 1] * 3, pool.map(work, [0, 1] * 3), strict=True):
            assert torch.equal(latents, serial[index])
            assert (frames.float() - serial_frames[index].float()).abs().max() <= 1


@pytest.mark.parametrize("latent_frames", [1, 3])
def test_decode_is_the_modules_own_and_repeatable(saved, latent_frames):
    latent = saved.encoder.encode(saved.clip(latent_frames)).mean
    frames = saved.encoder.decode(latent)
    assert frames.dtype == torch.uint8
    assert frames.shape == saved.clip(latent_frames).shape
    assert torch.equal(frames, saved.encoder.decode(latent))
    if getattr(saved.module.config, "timestep_conditioning", False):
        return  # that decoder adds noise: diffusers' own answer is another one each time
    expected = saved.decoded(latent)
    assert (frames.float() - expected).abs().max() <= 0.6
    assert frames.float().std() > 0.5  # not a clip of one colour


def test_what_is_off_the_grid_is_refused_with_the_nearest_sizes(saved):
    encoder, temporal, spatial = saved.encoder, saved.temporal, saved.spatial
    clip = saved.clip(latent_frames=2)
    if temporal > 1:
        with pytest.raises(GeometryError, match=rf"use 1 or {1 + temporal}"):
            encoder.encode(clip[:, :-1])
        with pytest.raises(GeometryError, match=f"chunk_frames {temporal + 1} is not a multiple of {temporal}"):
            encoder.encode(clip, chunk_frames=temporal + 1)
    with pytest.raises(GeometryError, match=rf"height {2 * spatial - 1} .*use {spatial} or {2 * spatial}"):
        encoder.encode(clip[:, :, :-1])
    with pytest.raises(GeometryError, match=rf"width {3 * spatial - 1} .*use {2 * spatial} or {3 * spatial}"):
        encoder.encode(clip[:, :, :, :-1])
    with pytest.raises(GeometryError, match="uint8 B T H W 3"):
        encoder.encode(clip.float())
    with pytest.raises(GeometryError, match=f"latents are B {saved.case.channels} t h w"):
        encoder.decode(torch.zeros(1, saved.case.channels + 1, 1, 1, 1))


def test_bfloat16_is_near_float32(saved):
    clip = saved.clip(latent_frames=2)
    latents = load_encoder(str(saved.directory), compute_dtype="bfloat16").encode(clip).mean
    assert latents.dtype == torch.float32
    near = 0.3 if saved.case.class_name == "AutoencoderVidTok" else 0.1  # FSQ takes a step or none
    assert 0 < difference_std(latents, saved.encoder.encode(clip).mean) < near


def test_images_are_encoded_in_bounded_slices(tmp_path, monkeypatch):
    from models.pretrained import images

    saved = Saved(STREAMED["kl-image"], tmp_path / "kl")
    clips = saved.clip(latent_frames=6, batch=3)
    wanted, sizes = saved.encoder.encode(clips).mean, []
    encode_images = images.KlImageBackend.encode_images

    def watched(self, frames):
        sizes.append(len(frames))
        return encode_images(self, frames)

    monkeypatch.setattr(images.KlImageBackend, "encode_images", watched)
    monkeypatch.setattr(images, "FRAMES_PER_SLICE", 4)
    assert difference_std(saved.encoder.encode(clips).mean, wanted) <= 1e-5
    assert max(sizes) == 4
    assert sum(sizes) == 3 * (1 + 8)  # the leading frame, and one chunk that is filled up
