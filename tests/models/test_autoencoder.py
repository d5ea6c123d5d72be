"""Our backbone: what each temporal mode sees; the same result whole, in chunks, batched or shared between threads."""

import dataclasses
import threading

import pytest
import torch

from models.autoencoder import CausalAutoencoder
from models.causal import FrameConv3d, GroupedConv3d, TemporalConv3d, depth_to_space, space_to_depth
from models.config import PRESETS, BackboneConfig, ModelConfig, Pyramid, preset
from models.spec import GeometryError
from tests.narrow import BACKBONES, NARROW, difference_std, random_model, random_pixels

STREAM_TOLERANCE_STD = 1e-5


@pytest.fixture(scope="module", params=sorted(BACKBONES))
def model(request):
    return random_model(BACKBONES[request.param])


def in_chunks(step, x, first, rest):
    """The outputs of `encode_chunk` or `decode_chunk` for chunks of `first`, then `rest` frames; and the last state."""
    state, outputs = {}, []
    for chunk in x.split([first, *[rest] * ((x.shape[2] - first) // rest)], dim=2):
        output, state = step(chunk, state)
        outputs.append(output)
    return outputs, state


def encode_in_chunks(model, clip, latents_per_chunk=1):
    stride = model.config.geometry.temporal_stride * latents_per_chunk
    posteriors, state = in_chunks(model.encode_chunk, clip, 1, stride)
    return (*(torch.cat([getattr(p, name) for p in posteriors], dim=2) for name in ("mean", "logvar")), state)


def changed_frames(function, x, frame):
    """The output frames that change when one input frame does."""
    other = x.clone()
    other[:, :, frame] += 1.0
    differs = function(x) != function(other)
    return [t for t in range(differs.shape[2]) if differs[:, :, t].any()]


def test_preset_names_say_their_geometry():
    for name, config in PRESETS.items():
        geometry = config.geometry
        strides = f"{geometry.temporal_stride}x{geometry.spatial_stride}x{geometry.spatial_stride}"
        assert name.partition("-")[2] == f"{strides}x{geometry.channels}"


def test_the_deep_preset_compresses_like_ltx():
    geometry = preset("base-8x32x32x128").geometry
    assert geometry.latent_shape(65, 512, 512) == (128, 9, 16, 16)
    assert 3 * 64 * 512 * 512 == 192 * 128 * 8 * 16 * 16  # of every latent frame but the leading one


def test_same_seed_same_weights():
    first, second = (random_model(NARROW).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", sorted(name for name in PRESETS if name.startswith("tiny")))
def test_shapes_follow_the_geometry(name):
    model = random_model(preset(name))
    clip = random_pixels(model, latent_frames=2, batch=2)
    posterior = model.encode(clip)
    assert tuple(posterior.mean.shape[1:]) == model.config.geometry.latent_shape(*clip.shape[2:])
    assert posterior.logvar.shape == posterior.mean.shape
    assert model.decode(posterior.mean).shape == clip.shape


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_can_be_built(name):
    with torch.device("meta"):
        model = CausalAutoencoder(ModelConfig(preset(name)))
        size = model.config.geometry.spatial_stride
        clip = torch.empty(1, 3, 1 + model.config.geometry.temporal_stride, size, size)
        assert model(clip).pixels.shape == clip.shape


def test_no_latent_sees_a_later_group(model):
    stride = model.config.geometry.temporal_stride
    clip = random_pixels(model, latent_frames=4)
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
    latent = model.encode(random_pixels(model, latent_frames=4)).mean
    changed = latent.clone()
    changed[:, :, 2:] += 1.0
    before, after = model.decode(latent), model.decode(changed)
    assert torch.equal(before[:, :, : 1 + stride], after[:, :, : 1 + stride])
    assert not torch.equal(before[:, :, 1 + stride], after[:, :, 1 + stride])


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("mode", "frame", "seen_by"),
    [
        ("causal", 4, [4, 5, 6, 7, 8]),  # 13 frames of the finest level are the groups 0 | 1-4 | 5-8 | 9-12
        ("causal", 5, [5, 6, 7, 8, 9]),
        ("chunk_causal", 4, [2, 3, 4, 5, 6]),  # two convolutions look two frames ahead and two back,
        ("chunk_causal", 3, [1, 2, 3, 4, 5]),
        ("chunk_causal", 5, [5, 6, 7]),  # but never ahead into the next group
        ("chunk_causal", 0, [0, 1, 2]),
    ],
)
def test_how_far_a_block_of_the_finest_level_looks(half, mode, frame, seen_by):
    model = random_model(dataclasses.replace(NARROW, temporal_mode=mode))
    block = model.encoder.blocks[0] if half == "encoder" else model.decoder.blocks[-1]
    x = torch.randn(1, 8, 13, 4, 4, generator=torch.Generator().manual_seed(0))
    assert changed_frames(lambda features: block(features, None), x, frame) == seen_by


def test_a_latent_of_chunk_causal_layers_knows_its_group_from_its_first_frame_on():
    model = random_model(BACKBONES["chunk_causal"])
    outputs = []
    hook = model.encoder.blocks[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    clip = random_pixels(model, latent_frames=3)
    changed = clip.clone()
    changed[:, :, 4] = 0.25  # the last frame of group 1-4
    for pixels in (clip, changed):
        model.encode(pixels)
    hook.remove()
    differs = (outputs[0] != outputs[1]).flatten(3).any(dim=3).any(dim=1)[0]
    assert differs.tolist() == [False, *[True] * 7, False]  # three convolutions reach three frames each way


def test_frame_mode_sees_one_frame_and_keeps_nothing():
    model = random_model(BACKBONES["frame-attention"])
    clip = random_pixels(model, latent_frames=4)
    assert changed_frames(lambda pixels: model.encode(pixels).mean, clip, 1) == [1]
    assert changed_frames(model.decode, model.encode(clip).mean, 1) == [1]
    *_, state = encode_in_chunks(model, clip)
    assert state == {}


def test_each_layer_keeps_only_the_frames_that_it_needs():
    for name, backbone in BACKBONES.items():
        model = random_model(backbone)
        layers = {key: layer for key, layer in model.encoder.named_modules() if isinstance(layer, TemporalConv3d)}
        *_, state = encode_in_chunks(model, random_pixels(model, latent_frames=3), latents_per_chunk=2)
        kept = {key.removeprefix("encoder."): past.shape[2] for key, past in state.items()}
        frames_of = {GroupedConv3d: 1, FrameConv3d: 0}
        wanted = {key: frames_of.get(type(layer), 2) for key, layer in layers.items()}
        assert kept == {key: frames for key, frames in wanted.items() if frames}, name
        for past in state.values():  # which are not a view that keeps a whole chunk alive
            assert past.untyped_storage().nbytes() == past.numel() * past.element_size()
        assert any(type(layer) is GroupedConv3d for layer in layers.values()) == name.startswith("chunk_causal")


@pytest.mark.parametrize("latents_per_chunk", [1, 2, 4])
def test_chunks_equal_the_whole_clip(model, latents_per_chunk):
    clip = random_pixels(model, latent_frames=9, batch=2)
    whole = model.encode(clip)
    mean, logvar, _ = encode_in_chunks(model, clip, latents_per_chunk)
    assert difference_std(mean, whole.mean) <= STREAM_TOLERANCE_STD
    assert difference_std(logvar, whole.logvar) <= STREAM_TOLERANCE_STD
    pieces, _ = in_chunks(model.decode_chunk, whole.mean, 1, latents_per_chunk)
    assert difference_std(torch.cat(pieces, dim=2), model.decode(whole.mean)) <= STREAM_TOLERANCE_STD


def test_a_first_chunk_may_hold_more_than_the_leading_frame(model):
    stride = model.config.geometry.temporal_stride
    clip = random_pixels(model, latent_frames=5)
    whole = model.encode(clip)
    posteriors, _ = in_chunks(model.encode_chunk, clip, 1 + 2 * stride, stride)
    assert difference_std(torch.cat([p.mean for p in posteriors], dim=2), whole.mean) <= STREAM_TOLERANCE_STD
    pieces, _ = in_chunks(model.decode_chunk, whole.mean, 3, 2)
    assert difference_std(torch.cat(pieces, dim=2), model.decode(whole.mean)) <= STREAM_TOLERANCE_STD


@pytest.mark.parametrize("mode", ["causal", "chunk_causal"])
def test_strides_need_not_be_two(mode):
    config = BackboneConfig(2, ((1, 2), (3, 1)), Pyramid((12, 24, 36), 2), Pyramid((12, 24, 24), 1), 5, mode)
    model = random_model(config)
    assert (config.geometry.temporal_stride, config.geometry.spatial_stride) == (3, 4)
    assert config.level_strides == ((3, 2), (3, 4), (1, 4))
    clip = random_pixels(model, latent_frames=4)
    mean, *_ = encode_in_chunks(model, clip)
    assert difference_std(mean, model.encode(clip).mean) <= STREAM_TOLERANCE_STD


def test_attention_starts_as_identity_and_then_sees_the_whole_frame():
    torch.manual_seed(0)
    quiet = CausalAutoencoder(ModelConfig(BACKBONES["causal-attention"])).requires_grad_(False)
    (attention,) = (block for block in quiet.encoder.blocks if type(block).__name__ == "FrameAttention")
    x = torch.randn(2, 16, 3, 4, 5)
    assert torch.equal(attention(x, None), x)
    model = random_model(BACKBONES["causal-attention"])
    attention = model.encoder.blocks[-1]
    changed = x.clone()
    changed[:, :, 1, 0, 0] += 1.0
    differs = (attention(x, None) != attention(changed, None)).any(dim=1)
    assert differs[:, 1].all()
    assert not differs[:, [0, 2]].any()


def test_an_image_is_the_first_latent(model):
    clip = random_pixels(model, latent_frames=3)
    image = model.encode(clip[:, :, :1]).mean
    assert image.shape[2] == 1
    assert difference_std(image, model.encode(clip).mean[:, :, :1]) <= STREAM_TOLERANCE_STD


def test_clips_of_any_length_on_the_grid_come_back_as_long(model):
    for latent_frames in (1, 2, 3, 6):
        clip = random_pixels(model, latent_frames)
        latent = model.encode(clip).mean
        assert latent.shape[2] == latent_frames
        assert model.decode(latent).shape == clip.shape


def test_a_batch_equals_its_clips(model):
    clips = random_pixels(model, latent_frames=2, batch=3)
    one_by_one = torch.cat([model.encode(clip[None]).mean for clip in clips])
    assert difference_std(model.encode(clips).mean, one_by_one) <= STREAM_TOLERANCE_STD


def test_a_state_that_was_passed_in_is_left_as_it_was(model):
    stride = model.config.geometry.temporal_stride
    clip = random_pixels(model, latent_frames=3)
    _, kept = model.encode_chunk(clip[:, :, : 1 + stride], {})
    once, _ = model.encode_chunk(clip[:, :, 1 + stride :], kept)
    again, _ = model.encode_chunk(clip[:, :, 1 + stride :], kept)
    assert torch.equal(once.mean, again.mean)


def test_two_threads_share_one_module(model):
    clips = random_pixels(model, latent_frames=4, batch=2)
    serial = [encode_in_chunks(model, clip[None])[0] for clip in clips]
    for _ in range(3):
        found = [None, None]
        barrier = threading.Barrier(2)

        def work(index, found=found, barrier=barrier):
            barrier.wait()
            found[index] = encode_in_chunks(model, clips[index][None])[0]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[index], serial[index]) for index in range(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of inductor itself
@pytest.mark.parametrize("name", ["causal", "chunk_causal-attention"])
def test_the_encoder_compiles_to_one_graph_per_shape(name):
    model = random_model(BACKBONES[name])
    clip = random_pixels(model, latent_frames=7)
    mean, *_ = encode_in_chunks(model, clip, latents_per_chunk=2)
    graphs = torch._dynamo.utils.counters["stats"]
    model.encoder.compile(fullgraph=True, dynamic=False)
    compiled, *_ = encode_in_chunks(model, clip, latents_per_chunk=2)
    assert difference_std(compiled, mean) <= STREAM_TOLERANCE_STD
    before = graphs["unique_graphs"]
    again, *_ = encode_in_chunks(model, clip, latents_per_chunk=2)
    assert torch.equal(again, compiled)
    assert graphs["unique_graphs"] == before


def test_chunks_off_the_grid_are_refused():
    model = random_model(NARROW)
    stride = model.config.geometry.temporal_stride
    clip = random_pixels(model, latent_frames=3)
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
    fields = {name: getattr(preset("tiny-4x8x8x16"), name) for name in BackboneConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**{**fields, **change})


def test_configs_survive_json():
    for backbone in PRESETS.values():
        assert ModelConfig.from_json(ModelConfig(backbone).as_json()) == ModelConfig(backbone)
    fields = ModelConfig(preset("tiny-4x8x8x16")).as_json()
    with pytest.raises(ValueError, match="lacks the field 'bottleneck'"):
        ModelConfig.from_json({name: value for name, value in fields.items() if name != "bottleneck"})
    with pytest.raises(ValueError, match="colour"):
        ModelConfig.from_json({**fields, "colour": 1})
    with pytest.raises(ValueError, match="use one of tiny-"):
        preset("huge")
