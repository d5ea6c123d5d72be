"""Two levels in one stored latent: causal, streamed exactly, both grids of codes kept, and both of use."""

import dataclasses

import pytest
import torch

from models.autoencoder import CausalAutoencoder
from models.bottlenecks.config import Fsq, Kl, Vq
from models.build import build_model
from models.checkpoint import load_checkpoint, save_checkpoint
from models.config import PRESETS, BackboneConfig, ModelConfig, Pyramid, TopLevel
from models.encoders import describe, load_encoder
from models.kinds.registry import kind_class
from models.kinds.vq_vae_2 import VqVae2
from models.pixels import to_pixels
from models.spec import GeometryError, Normaliser
from models.train_settings import TrainSettings
from models.training import random_objective, train
from models.two_level import TwoLevelAutoencoder
from tests.moving_shapes import moving_squares

STREAM_TOLERANCE_STD = 1e-5

BACKBONE = BackboneConfig(2, ((2, 2),), Pyramid((8, 16), 1), Pyramid((8, 16), 1), latent_channels=4)
TOP = TopLevel(downs=((2, 2),), channels=(16,), depth=1, latent_channels=6)
UNEVEN = BackboneConfig(2, ((1, 2), (3, 1)), Pyramid((12, 24, 36), 1), Pyramid((12, 24, 24), 1), latent_channels=2)
CONFIGS = {
    "kl": ModelConfig(BACKBONE, Kl(), "vq_vae_2", TOP),
    "vq": ModelConfig(BACKBONE, Vq(codebook_size=32), "vq_vae_2", TOP),
    "uneven strides": ModelConfig(UNEVEN, Kl(), "vq_vae_2", TopLevel(((2, 1), (1, 2)), (36, 48), 1, 5)),
    "chunk causal": ModelConfig(dataclasses.replace(BACKBONE, temporal_mode="chunk_causal"), Kl(), "vq_vae_2", TOP),
    "frame": ModelConfig(
        BackboneConfig(2, ((1, 2),), Pyramid((8, 16), 1), Pyramid((8, 16), 1), 4, temporal_mode="frame"),
        Kl(),
        "vq_vae_2",
        TopLevel(((1, 2),), (16,), 1, 6),
    ),
}


def random_model(config):
    """Weights that make every layer count: zero-initialised convolutions would hide a broken residual block."""
    torch.manual_seed(0)
    model = build_model(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 5:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request):
    return random_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def vq_model():
    return random_model(CONFIGS["vq"])


def random_clip(model, latent_frames, batch=1):
    """A clip whose latent is latent_frames x 1 x 2."""
    stride, size = model.config.geometry.temporal_stride, model.config.geometry.spatial_stride
    shape = (batch, 3, 1 + stride * (latent_frames - 1), size, 2 * size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def difference_std(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()


def encode_chunks(model, clip, latents_per_chunk):
    step = model.config.geometry.temporal_stride * latents_per_chunk
    state, posteriors, sizes = {}, [], []
    for chunk in clip.split([1, *[step] * ((clip.shape[2] - 1) // step)], dim=2):
        posterior, state = model.encode_chunk(chunk, state)
        posteriors.append(posterior)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in state.values()))
    return posteriors, sizes


def decode_chunks(model, latent, latents_per_chunk):
    state, pieces = {}, []
    for chunk in latent.split(latents_per_chunk, dim=2):
        pixels, state = model.decode_chunk(chunk, state)
        pieces.append(pixels)
    return torch.cat(pieces, dim=2)


def test_the_geometry_is_the_tops_with_the_bottom_folded_in(model):
    geometry = model.config.geometry
    assert isinstance(model, TwoLevelAutoencoder)
    clip = random_clip(model, latent_frames=3, batch=2)
    posterior = model.encode(clip)
    assert tuple(posterior.mean.shape[1:]) == geometry.latent_shape(*clip.shape[2:])
    assert model.decode(posterior.mean).shape == clip.shape
    bottom = model.config.backbone.geometry
    volume = (geometry.temporal_stride // bottom.temporal_stride) * (
        geometry.spatial_stride // bottom.spatial_stride
    ) ** 2
    assert geometry.channels == model.config.top.latent_channels + volume * bottom.channels
    if isinstance(model.config.bottleneck, Kl):
        assert posterior.logvar.shape == posterior.mean.shape
    else:
        assert posterior.logvar is None


def test_the_strides_of_both_levels_multiply():
    assert [
        (geometry.temporal_stride, geometry.spatial_stride, geometry.channels)
        for geometry in (CONFIGS[name].geometry for name in ("vq", "uneven strides", "frame"))
    ] == [(4, 8, 6 + 8 * 4), (6, 8, 5 + 8 * 2), (1, 8, 6 + 4 * 4)]


def test_no_latent_sees_a_later_group(model):
    stride = model.config.geometry.temporal_stride
    clip = random_clip(model, latent_frames=4)
    before = model.encode(clip).mean
    for latent_frame in range(3):
        changed = clip.clone()
        changed[:, :, 1 + stride * latent_frame :] *= -1
        after = model.encode(changed).mean
        seen = slice(0, latent_frame + 1)
        assert torch.equal(before[:, :, seen], after[:, :, seen])
        for first, second in zip(model.split(before), model.split(after), strict=True):
            assert not torch.equal(first, second)  # both levels see what comes next


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
    clip = random_clip(model, latent_frames=7)
    whole = model.encode(clip)
    posteriors, _ = encode_chunks(model, clip, latents_per_chunk)
    mean = torch.cat([posterior.mean for posterior in posteriors], dim=2)
    assert difference_std(mean, whole.mean) <= STREAM_TOLERANCE_STD
    if whole.logvar is not None:
        logvar = torch.cat([posterior.logvar for posterior in posteriors], dim=2)
        assert difference_std(logvar, whole.logvar) <= STREAM_TOLERANCE_STD
    pixels = decode_chunks(model, whole.mean, latents_per_chunk)
    assert difference_std(pixels, model.decode(whole.mean)) <= STREAM_TOLERANCE_STD


def test_an_image_is_the_first_latent_and_a_batch_equals_its_clips(model):
    clips = random_clip(model, latent_frames=3, batch=2)
    latents = model.encode(clips).mean
    assert difference_std(model.encode(clips[:, :, :1]).mean, latents[:, :, :1]) <= STREAM_TOLERANCE_STD
    one_by_one = torch.cat([model.encode(clip[None]).mean for clip in clips])
    assert difference_std(latents, one_by_one) <= STREAM_TOLERANCE_STD


def test_the_state_does_not_grow_and_is_not_changed(vq_model):
    clip = random_clip(vq_model, latent_frames=5)
    _, sizes = encode_chunks(vq_model, clip, 1)
    assert sizes == [sizes[0]] * len(sizes)
    _, kept = vq_model.encode_chunk(clip[:, :, :5], {})
    once, _ = vq_model.encode_chunk(clip[:, :, 5:], kept)
    again, _ = vq_model.encode_chunk(clip[:, :, 5:], kept)
    assert torch.equal(once.mean, again.mean)


def test_chunks_must_hold_whole_groups_of_the_top(vq_model):
    clip = random_clip(vq_model, latent_frames=2)
    with pytest.raises(GeometryError, match=r"the first chunk of a stream has 1\+4k frames, got 3"):
        vq_model.encode_chunk(clip[:, :, :3], {})
    with pytest.raises(GeometryError, match="height 4 is not a multiple of 8"):
        vq_model.encode(clip[:, :, :, :4])


def test_split_undoes_join(model):
    top_stride = model.config.top.strides[0]
    bottom_shape = (2, model.config.backbone.latent_channels, 1 + 2 * top_stride, 8, 12)
    bottom = torch.randn(bottom_shape)
    top = torch.randn(
        2, model.config.top.latent_channels, 3, *(size // model.config.top.strides[1] for size in (8, 12))
    )
    joined = model.join(top, bottom)
    assert joined.shape[1:] == (model.config.geometry.channels, *top.shape[2:])
    assert torch.equal(joined[:, : top.shape[1]], top)
    for found, given in zip(model.split(joined), (top, bottom), strict=True):
        assert torch.equal(found, given)


def test_both_grids_of_ids_come_back_from_a_float16_latent(vq_model):
    clip = random_clip(vq_model, latent_frames=3, batch=2)
    latent = vq_model.encode(clip).mean
    top, bottom = vq_model.latent_to_ids(latent.half())
    assert top.dtype == bottom.dtype == torch.int64
    assert (top.shape, bottom.shape) == ((2, 1, 3, 1, 2), (2, 1, 5, 2, 4))
    assert len(top.unique()) > 1
    assert len(bottom.unique()) > 1
    assert torch.equal(vq_model.ids_to_latent((top, bottom)), latent)
    trained = vq_model(clip).bottlenecked
    assert torch.equal(trained.ids, vq_model.join(top, bottom))
    assert difference_std(trained.latent, latent) <= STREAM_TOLERANCE_STD


def test_a_training_pass_decodes_what_it_stores(model):
    clip = random_clip(model, latent_frames=2)
    output = model(clip, generator=torch.Generator().manual_seed(0))
    assert difference_std(output.pixels, model.decode(output.bottlenecked.latent)) <= STREAM_TOLERANCE_STD


def test_gradients_reach_both_codebooks_and_every_part():
    # Fewer codes than positions: a code that lies on its only feature has no gradient.
    objective = random_objective(VqVae2(bottleneck=Vq(codebook_size=4, update="gradient")), BACKBONE, seed=0)
    clip = random_clip(objective.model, latent_frames=3, batch=2)
    terms = objective.train()(clip, step=1)
    assert {"top_commitment", "bottom_commitment", "top_usage", "bottom_usage"} <= terms.values.keys()
    terms.loss.backward()
    parts = dict(objective.model.named_children())
    levels = {"top_encoder", "top_bottleneck", "top_decoder", "to_bottom"}
    assert set(parts) == {"encoder", "bottleneck", "decoder"} | levels
    for part in parts.values():
        assert sum(weight.grad.abs().sum() for weight in part.parameters()) > 0


def test_reconstruction_alone_reaches_the_encoder_through_both_codes():
    model = random_model(CONFIGS["vq"]).requires_grad_()
    clip = random_clip(model, latent_frames=2)
    output = model(clip)
    output.pixels.square().mean().backward()
    assert all(part.conv_out.conv.weight.grad.abs().sum() > 0 for part in (model.encoder, model.top_encoder))


def test_both_averaged_codebooks_learn():
    model = random_model(CONFIGS["vq"]).train()
    before = [part.codebook.weight.clone() for part in (model.top_bottleneck, model.bottleneck)]
    model(random_clip(model, latent_frames=2))
    after = [part.codebook.weight for part in (model.top_bottleneck, model.bottleneck)]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_checkpoint_comes_back_and_serves_the_pipeline(tmp_path, vq_model):
    channels = vq_model.config.geometry.channels
    save_checkpoint(tmp_path / "model", vq_model, Normaliser((0.0,) * channels, (1.0,) * channels))
    loaded, document = load_checkpoint(tmp_path / "model")
    assert isinstance(loaded, TwoLevelAutoencoder)
    assert document.config == vq_model.config
    assert all(torch.equal(weight, vq_model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    card = describe(str(tmp_path / "model"))
    assert (card.name, card.geometry, card.posterior) == ("vq_vae_2-4x8x8x38", vq_model.config.geometry, False)
    encoder = load_encoder(str(tmp_path / "model"))
    frames = torch.randint(0, 256, (1, 9, 16, 16, 3), dtype=torch.uint8)
    latent = encoder.encode(frames).mean
    assert difference_std(latent, vq_model.encode(to_pixels(frames, "cpu")).mean) <= STREAM_TOLERANCE_STD
    assert encoder.decode(latent).shape == frames.shape


def test_configs_survive_json_and_name_their_class():
    for config in CONFIGS.values():
        assert ModelConfig.from_json(config.as_json()) == config
    single = ModelConfig(BACKBONE)
    assert "top" not in single.as_json()
    assert type(build_model(single)) is CausalAutoencoder
    with pytest.raises(ValueError, match="needs a config with a top"):
        TwoLevelAutoencoder(single)
    fields = CONFIGS["vq"].as_json()
    with pytest.raises(ValueError, match="colour"):
        ModelConfig.from_json({**fields, "top": {**fields["top"], "colour": 1}})
    with pytest.raises(ValueError, match="lacks the field 'downs'"):
        ModelConfig.from_json({**fields, "top": {"depth": 1}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downs": ()}, "top.downs are one or more"),
        ({"downs": ((2, 0),)}, "top.downs are one or more"),
        ({"channels": (16, 16)}, "one count per down"),
        ({"depth": 0}, "top.depth 0"),
        ({"channels": (12,)}, "top.channels 16 -> 12"),
    ],
)
def test_a_top_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(BACKBONE, Kl(), "vq_vae_2", dataclasses.replace(TOP, **change))


def test_a_top_has_to_suit_backbone_and_bottleneck():
    with pytest.raises(ValueError, match="latent_channels must be 4"):
        ModelConfig(BACKBONE, Fsq((8, 8, 5, 5)), "vq_vae_2", TOP)
    with pytest.raises(ValueError, match="'frame' needs temporal strides of 1"):
        dataclasses.replace(CONFIGS["frame"], top=TOP)


def test_the_kind_fits_every_preset():
    assert kind_class("vq_vae_2") is VqVae2
    for backbone in PRESETS.values():
        if backbone.temporal_mode != "frame" and backbone.geometry.temporal_stride > 1:
            config = VqVae2().model_config(backbone)
            assert config.geometry.channels == 9 * backbone.latent_channels
            assert config.geometry.spatial_stride == 2 * backbone.geometry.spatial_stride
    assert VqVae2(top_latent_channels=3).model_config(BACKBONE).top.latent_channels == 3


def test_it_learns_and_both_levels_carry_information():
    losses = []
    model = train(
        VqVae2(bottleneck=Vq(codebook_size=64)),
        BACKBONE,
        moving_squares(),
        steps=150,
        settings=TrainSettings(learning_rate=4e-3, warmup_steps=5),
        progress=lambda step, values: losses.append(values["l1"]),
    ).model
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])  # 0.50 when this was written
    unseen = moving_squares(seed=9)
    clips = to_pixels(torch.cat([next(unseen) for _ in range(8)]), "cpu")
    with torch.inference_mode():
        top, bottom = model.split(model.encode(clips).mean)
        whole, without_top, without_bottom = (
            (model.decode(model.join(*levels)) - clips).abs().mean().item()
            for levels in ((top, bottom), (0 * top, bottom), (top, 0 * bottom))
        )
        another_bottom = (model.decode(model.join(top, bottom.roll(1, dims=0))) - clips).abs().mean().item()
    assert without_top > 1.2 * whole  # 1.36 when this was written
    assert without_bottom > 1.04 * whole  # 1.09
    assert another_bottom > 1.05 * whole  # 1.11
