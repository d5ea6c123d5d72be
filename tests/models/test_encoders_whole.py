"""Encoders that take a clip whole: what the plain module says, on our grid, and honest about the future."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("diffusers")

import torch

from models.encoders import describe, load_encoder
from models.pixels import to_pixels
from models.spec import GeometryError, Posterior
from models.whole import WholeEncoder
from tests.pretrained_models import WHOLE, Saved, difference_std


@pytest.fixture(scope="module", params=sorted(WHOLE))
def saved(request, tmp_path_factory):
    return Saved(WHOLE[request.param], tmp_path_factory.mktemp("encoder") / request.param)


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    return Saved(WHOLE["hunyuanvideo"], tmp_path_factory.mktemp("encoder") / "hunyuan")


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory):
    return Saved(WHOLE["cogvideox"], tmp_path_factory.mktemp("encoder") / "cogvideox")


@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_latents_are_the_modules_own(saved, latent_frames):
    clip = saved.clip(latent_frames)
    posterior = saved.encoder.encode(clip)
    mean, logvar = saved.whole(clip)
    assert tuple(mean.shape[1:]) == saved.encoder.card.geometry.latent_shape(*clip.shape[1:4])
    # Mochi's Fourier features turn the last bit of a pixel into a ten-thousandth.
    tolerance = 1e-3 if saved.case.class_name == "AutoencoderKLMochi" else 1e-5
    assert difference_std(posterior.mean, mean) <= tolerance
    assert posterior.mean.dtype == torch.float32
    assert (posterior.logvar is not None) == saved.case.posterior
    if saved.case.posterior:
        assert difference_std(posterior.logvar, logvar) <= tolerance


def test_the_card_is_as_the_family_says(saved):
    card, geometry = saved.encoder.card, saved.encoder.card.geometry
    assert (geometry.temporal_stride, geometry.spatial_stride) == saved.case.strides
    assert geometry.channels == saved.case.channels == len(card.normaliser.mean)
    assert geometry.leading_frame
    assert geometry.causality == saved.case.causality
    assert card.posterior == saved.case.posterior
    assert describe(str(saved.directory)) == card


def test_the_future_leaks_where_the_card_says_so_and_nowhere_else(saved):
    clip = saved.clip(latent_frames=4)
    changed = clip.clone()
    changed[:, 1 + saved.temporal :] = 7
    before, after = (saved.encoder.encode(one).mean for one in (clip, changed))
    leak = (before - after)[:, :, :2].abs().max() / before.std()
    assert leak > 1e-2 if saved.case.causality == "none" else leak == 0
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_attention_over_the_past_reaches_back(saved):
    """What "causal-attention" says beyond "causal": late latents depend on a clip's first frame, however far."""
    clip = saved.clip(latent_frames=8)
    changed = clip.clone()
    changed[:, :1] = 7
    before, after = (saved.encoder.encode(one).mean[:, :, -1] for one in (clip, changed))
    assert not torch.equal(before, after)


def test_whoever_wants_a_stream_is_told_that_there_is_none(saved):
    clip = saved.clip(latent_frames=2)
    with pytest.raises(GeometryError, match=rf"chunk_frames {saved.temporal}: {saved.case.class_name} cannot stream"):
        saved.encoder.encode(clip, chunk_frames=saved.temporal)
    with pytest.raises(GeometryError, match=f"{saved.case.class_name} cannot stream"):
        saved.encoder.encode_stream()


def test_a_batch_equals_its_clips(saved):
    clips = saved.clip(latent_frames=2, batch=2)
    one_by_one = torch.cat([saved.encoder.encode(clip[None]).mean for clip in clips])
    assert difference_std(saved.encoder.encode(clips).mean, one_by_one) <= 1e-5
    frames, single = saved.encoder.decode(one_by_one), [saved.encoder.decode(latent[None]) for latent in one_by_one]
    assert (frames.int() - torch.cat(single).int()).abs().max() <= 1


@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_decode_gives_the_clips_shape(saved, latent_frames):
    latent = saved.encoder.encode(saved.clip(latent_frames)).mean
    frames = saved.encoder.decode(latent)
    assert frames.dtype == torch.uint8
    assert frames.shape == saved.clip(latent_frames).shape
    if saved.case.class_name != "AutoencoderKLCogVideoX" or latent_frames % 2:
        assert (frames.float() - saved.decoded(latent)).abs().max() <= 0.6


def test_threads_may_share_an_encoder(saved):
    clips = [saved.clip(latent_frames=2), 255 - saved.clip(latent_frames=2)]
    serial = [saved.encoder.encode(clip).mean for clip in clips]
    with ThreadPoolExecutor(2) as pool:
        latents = list(pool.map(lambda index: saved.encoder.encode(clips[index]).mean, [0, 1] * 3))
    assert all(difference_std(one, serial[index % 2]) <= 1e-5 for index, one in enumerate(latents))


def test_one_call_at_a_time_runs_on_the_model(hunyuan):
    """A whole clip's activations are large: two callers must not hold them at once."""
    inside, most = 0, 0

    class Slow:
        def to(self, device, dtype):
            pass

        def encode(self, pixels):
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1
            return Posterior(pixels, None)

    encoder = WholeEncoder(hunyuan.encoder.card, Slow(), "cpu", torch.float32)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encoder.encode, [hunyuan.clip(1)] * 4))
    assert most == 1


def test_what_is_off_the_grid_is_refused_with_the_nearest_sizes(saved):
    encoder, temporal, spatial = saved.encoder, saved.temporal, saved.spatial
    clip = saved.clip(latent_frames=2)
    with pytest.raises(GeometryError, match=rf"use 1 or {1 + temporal}"):
        encoder.encode(clip[:, :-1])
    with pytest.raises(GeometryError, match=rf"height {2 * spatial - 1} .*use {spatial} or {2 * spatial}"):
        encoder.encode(clip[:, :, :-1])
    with pytest.raises(GeometryError, match=rf"width {3 * spatial - 1} .*use {2 * spatial} or {3 * spatial}"):
        encoder.encode(clip[:, :, :, :-1])
    with pytest.raises(GeometryError, match="uint8 B T H W 3"):
        encoder.encode(clip.float())
    with pytest.raises(GeometryError, match="uint8 B T H W 3"):
        encoder.encode(clip[0])
    with pytest.raises(GeometryError, match=f"latents are B {saved.case.channels} t h w"):
        encoder.decode(torch.zeros(1, saved.case.channels + 1, 1, 1, 1))


@pytest.mark.parametrize("saved", sorted(WHOLE.keys() - {"cosmos"}), indirect=True)  # which torch cannot, on a CPU
def test_bfloat16_is_near_float32(saved):
    clip = saved.clip(latent_frames=2)
    latents = load_encoder(str(saved.directory), compute_dtype="bfloat16").encode(clip).mean
    assert latents.dtype == torch.float32
    assert 0 < difference_std(latents, saved.encoder.encode(clip).mean) < 0.1


def test_hunyuanvideo_does_not_tile_long_clips(hunyuan):
    """The plain layers on 21 frames; the module left to itself would blend tiles of 16."""
    clip = hunyuan.clip(latent_frames=6)
    pixels = to_pixels(clip, "cpu")
    with torch.inference_mode():
        plain = hunyuan.module.quant_conv(hunyuan.module.encoder(pixels)).chunk(2, dim=1)[0]
        tiled = hunyuan.module.encode(pixels).latent_dist.mode()
    latents = hunyuan.encoder.encode(clip).mean
    assert difference_std(latents, plain) <= 1e-5
    assert difference_std(latents, tiled) > 1e-2
    with torch.inference_mode():
        decoded = hunyuan.module.decoder(hunyuan.module.post_quant_conv(latents))
    expected = ((decoded + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 4, 1)
    assert (hunyuan.encoder.decode(latents).float() - expected).abs().max() <= 0.6


def test_cogvideox_keeps_the_division_of_its_pipelines(cogvideox):
    """17 frames are 9 and 8: as the module left to itself does it, and not as one piece."""
    clip = cogvideox.clip(latent_frames=5)
    with torch.inference_mode():
        whole, _ = cogvideox.module.encoder(to_pixels(clip, "cpu"))
    latents = cogvideox.encoder.encode(clip).mean
    assert difference_std(latents, cogvideox.whole(clip)[0]) <= 1e-5
    assert difference_std(latents, whole.chunk(2, dim=1)[0]) > 1e-2


def test_cogvideox_decodes_an_even_number_of_latents_as_if_the_last_lasted(cogvideox):
    latents = cogvideox.encoder.encode(cogvideox.clip(latent_frames=4)).mean
    longer = torch.cat([latents, latents[:, :, -1:]], dim=2)
    assert torch.equal(cogvideox.encoder.decode(latents), cogvideox.encoder.decode(longer)[:, :13])
