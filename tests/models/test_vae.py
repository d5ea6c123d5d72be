"""Our backbone: strictly causal, and the same result whole, streamed, batched or shared between threads."""

import threading

import pytest
import torch

from models.causal import depth_to_space, space_to_depth
from models.config import PRESETS, Pyramid, VaeConfig, preset
from models.spec import GeometryError
from models.vae import CausalVae

STREAM_TOLERANCE_STD = 1e-5


NARROW_8X32X32 = VaeConfig(4, ((2, 2),) * 3, Pyramid((8, 16, 16, 16), 1), Pyramid((8, 16, 16, 16), 1), 8)


@pytest.fixture(scope="module", params=["tiny-4x8x8x16", "narrow-8x32x32x8"])
def model(request):
    return random_model(NARROW_8X32X32 if request.param.startswith("narrow") else preset(request.param))


def random_model(config):
    """Weights that make every layer count: zero-initialised convolutions would hide a broken residual block."""
    torch.manual_seed(0)
    model = CausalVae(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 5:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


def random_clip(model, latent_frames, batch=1):
    """A clip whose latent is latent_frames x 1 x 2."""
    stride, size = model.config.geometry.temporal_stride, model.config.geometry.spatial_stride
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, 1 + stride * (latent_frames - 1), size, 2 * size)
    return torch.rand(shape, generator=generator) * 2 - 1


def difference_std(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()


def split_frames(model, num_frames, latents_per_chunk):
    """Frame counts of the chunks: the first also holds the leading frame."""
    step = model.config.geometry.temporal_stride * latents_per_chunk
    first = min(num_frames, 1 + step)
    return [first] + [min(step, num_frames - at) for at in range(first, num_frames, step)]


def test_preset_names_say_their_geometry():
    for name, config in PRESETS.items():
        geometry = config.geometry
        strides = f"{geometry.temporal_stride}x{geometry.spatial_stride}x{geometry.spatial_stride}"
        assert name == f"tiny-{strides}x{geometry.channels}"


def test_same_seed_same_weights():
    first, second = (random_model(preset("tiny-4x8x8x16")).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_shapes_follow_the_geometry(name):
    model = random_model(preset(name))
    clip = random_clip(model, latent_frames=2, batch=2)
    posterior = model.encode(clip)
    assert tuple(posterior.mean.shape[1:]) == model.config.geometry.latent_shape(*clip.shape[2:])
    assert posterior.logvar.shape == posterior.mean.shape
    assert model.decode(posterior.mean).shape == clip.shape


def test_no_latent_sees_a_later_frame(model):
    stride = model.config.geometry.temporal_stride
    clip = random_clip(model, latent_frames=4)
    for latent_frame in range(3):
        changed = clip.clone()
        changed[:, :, 1 + stride * latent_frame :] = 0.25
        before, after = model.encode(clip), model.encode(changed)
        seen = slice(0, latent_frame + 1)
        assert torch.equal(before.mean[:, :, seen], after.mean[:, :, seen])
        assert torch.equal(before.logvar[:, :, seen], after.logvar[:, :, seen])
        assert not torch.equal(before.mean[:, :, latent_frame + 1], after.mean[:, :, latent_frame + 1])


def test_no_pixel_sees_a_later_latent(model):
    stride = model.config.geometry.temporal_stride
    latent = model.encode(random_clip(model, latent_frames=4)).mean
    changed = latent.clone()
    changed[:, :, 2:] += 1.0
    before, after = model.decode(latent), model.decode(changed)
    assert torch.equal(before[:, :, : 1 + stride], after[:, :, : 1 + stride])
    assert not torch.equal(before[:, :, 1 + stride], after[:, :, 1 + stride])


@pytest.mark.parametrize("latents_per_chunk", [1, 2, 3])
def test_a_stream_equals_the_whole_clip(model, latents_per_chunk):
    clip = random_clip(model, latent_frames=6)
    whole = model.encode(clip)
    encode, decode = model.encode_stream(), model.decode_stream()
    pieces = [encode.push(chunk) for chunk in clip.split(split_frames(model, clip.shape[2], latents_per_chunk), dim=2)]
    mean = torch.cat([piece.mean for piece in pieces], dim=2)
    logvar = torch.cat([piece.logvar for piece in pieces], dim=2)
    assert difference_std(mean, whole.mean) <= STREAM_TOLERANCE_STD
    assert difference_std(logvar, whole.logvar) <= STREAM_TOLERANCE_STD
    pixels = torch.cat([decode.push(chunk) for chunk in whole.mean.split(latents_per_chunk, dim=2)], dim=2)
    assert difference_std(pixels, model.decode(whole.mean)) <= STREAM_TOLERANCE_STD


def test_chunking_is_exact_where_strides_are_one_in_time():
    config = VaeConfig(2, ((1, 2), (3, 1)), Pyramid((12, 24, 36), 2), Pyramid((12, 24, 24), 1), latent_channels=5)
    model = random_model(config)
    assert config.geometry.temporal_stride == 3
    assert config.geometry.spatial_stride == 4
    clip = random_clip(model, latent_frames=4)
    stream = model.encode_stream()
    means = [stream.push(chunk).mean for chunk in clip.split(split_frames(model, clip.shape[2], 1), dim=2)]
    assert difference_std(torch.cat(means, dim=2), model.encode(clip).mean) <= STREAM_TOLERANCE_STD


def test_an_image_is_the_first_latent(model):
    clip = random_clip(model, latent_frames=3)
    image = model.encode(clip[:, :, :1]).mean
    assert image.shape[2] == 1
    assert difference_std(image, model.encode(clip).mean[:, :, :1]) <= STREAM_TOLERANCE_STD


def test_a_batch_equals_its_clips(model):
    clips = random_clip(model, latent_frames=2, batch=3)
    one_by_one = torch.cat([model.encode(clip[None]).mean for clip in clips])
    assert difference_std(model.encode(clips).mean, one_by_one) <= STREAM_TOLERANCE_STD


def test_the_state_does_not_grow_with_the_clip(model):
    stride = model.config.geometry.temporal_stride
    clip = random_clip(model, latent_frames=6)
    stream, sizes = model.encode_stream(), []
    for chunk in clip.split(split_frames(model, clip.shape[2], 1), dim=2):
        stream.push(chunk)
        sizes.append(sum(tail.untyped_storage().nbytes() for tail in stream.state.values()))
    assert sizes == [sizes[0]] * len(sizes)
    long = model.encode_stream()
    long.push(clip[:, :, : 1 + 4 * stride])
    assert sum(tail.untyped_storage().nbytes() for tail in long.state.values()) == sizes[0]


def test_a_stream_resumes_from_a_state_that_was_kept(model):
    stride = model.config.geometry.temporal_stride
    clip = random_clip(model, latent_frames=3)
    _, kept = model.encode_chunk(clip[:, :, : 1 + stride], {})
    once, _ = model.encode_chunk(clip[:, :, 1 + stride :], kept)
    again, _ = model.encode_chunk(clip[:, :, 1 + stride :], kept)
    assert torch.equal(once.mean, again.mean)


def test_two_threads_share_one_module(model):
    stride = model.config.geometry.temporal_stride
    clips = random_clip(model, latent_frames=4, batch=2)
    serial = [encode_in_chunks(model, clip[None], stride) for clip in clips]
    for _ in range(3):
        found = [None, None]
        barrier = threading.Barrier(2)

        def work(index, found=found, barrier=barrier):
            barrier.wait()
            found[index] = encode_in_chunks(model, clips[index][None], stride)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(difference_std(found[index], serial[index]) <= STREAM_TOLERANCE_STD for index in range(2))


def encode_in_chunks(model, clip, stride):
    stream = model.encode_stream()
    chunks = [1, *([stride] * ((clip.shape[2] - 1) // stride))]
    return torch.cat([stream.push(chunk).mean for chunk in clip.split(chunks, dim=2)], dim=2)


def test_chunks_off_the_grid_are_refused(model):
    stride = model.config.geometry.temporal_stride
    clip = random_clip(model, latent_frames=3)
    with pytest.raises(GeometryError, match=f"use {1 + stride} or {1 + 2 * stride}"):
        model.encode(clip[:, :, : 2 + stride])
    with pytest.raises(GeometryError, match=r"the first chunk of a stream has 1\+"):
        model.encode_chunk(clip[:, :, :stride], {})
    _, state = model.encode_chunk(clip[:, :, :1], {})
    with pytest.raises(GeometryError, match=f"a later chunk of a stream has {stride}k frames, got 1"):
        model.encode_chunk(clip[:, :, 1:2], state)


def test_space_to_depth_is_undone_by_depth_to_space():
    x = torch.arange(2 * 3 * 5 * 4 * 6, dtype=torch.float32).reshape(2, 3, 5, 4, 6)
    folded = space_to_depth(x, 2, 2, first=True)
    assert folded.shape == (2, 24, 3, 2, 3)
    assert torch.equal(depth_to_space(folded, 2, 2, first=True), x)
    # Channel slowest, then time, row, column within a group; the first group holds the first frame twice.
    assert torch.equal(folded[0, 8:16, 0, 0, 0], x[0, 1, 0, :2, :2].flatten().repeat(2))
    assert torch.equal(folded[0, 16:24, 1, 1, 2], x[0, 2, 1:3, 2:4, 4:6].flatten())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": Pyramid((16, 32), 1)}, "encoder.channels needs 3 levels"),
        ({"encoder": Pyramid((16, 36, 64), 1)}, "multiple of 8"),
        ({"decoder": Pyramid((16, 24, 64), 1)}, "decoder.channels 16 -> 24"),
        ({"downs": ((2, 2), (0, 2))}, "downs are"),
        ({"latent_channels": 0}, "at least 1"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(change, message):
    fields = {name: getattr(preset("tiny-4x8x8x16"), name) for name in VaeConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        VaeConfig(**{**fields, **change})


def test_configs_survive_json():
    for config in PRESETS.values():
        assert VaeConfig.from_json(config.as_json()) == config
    with pytest.raises(ValueError, match="lacks the field 'downs'"):
        VaeConfig.from_json({name: value for name, value in config.as_json().items() if name != "downs"})
    with pytest.raises(ValueError, match="colour"):
        VaeConfig.from_json({**config.as_json(), "colour": 1})
    with pytest.raises(ValueError, match="use one of tiny-"):
        preset("huge")
