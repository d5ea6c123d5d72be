"""Every encoder the way a user gets it: saved to a directory, loaded by name, compared with the plain whole clip."""

import json
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import torch

from models.checkpoint import save_checkpoint
from models.config import Pyramid, VaeConfig
from models.encoders import describe, load_encoder, resolve_source
from models.errors import CheckpointError, EncoderProbeError, EncoderSourceError
from models.spec import GeometryError, Normaliser
from models.vae import CausalVae

diffusers = pytest.importorskip("diffusers")

WAN = {"dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True, True], "z_dim": 4}
WAN_21 = {**WAN, "base_dim": 8, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
WAN_22 = {
    **WAN_21,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "decoder_base_dim": 8,
    "scale_factor_spatial": 16,
}
LTX_09 = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": (1,) * 5,
    "decoder_block_out_channels": (8, 8, 16, 16),
    "decoder_layers_per_block": (1,) * 5,
    "scaling_factor": 0.5,
}
LTX_095 = {
    "latent_channels": 8,
    "block_out_channels": (8, 16, 16, 16, 16),
    "layers_per_block": (1,) * 5,
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "spatio_temporal_scaling": (True,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (True,) * 4,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}
OURS = VaeConfig(2, ((2, 2), (2, 2)), Pyramid((8, 16, 16), 1), Pyramid((8, 16, 16), 1), latent_channels=4)
SAVED = {
    "ours": (None, (4, 8, 4)),
    "wan-2.1": ("AutoencoderKLWan", WAN_21, (4, 8, 4)),
    "wan-2.2": ("AutoencoderKLWan", WAN_22, (4, 16, 4)),
    "ltx-0.9": ("AutoencoderKLLTXVideo", LTX_09, (8, 32, 8)),
    "ltx-0.9.5": ("AutoencoderKLLTXVideo", LTX_095, (8, 32, 8)),
}


def with_random_weights(model):
    """Layers that start at zero would hide a broken residual block."""
    for weight in model.parameters():
        if weight.ndim == 5:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


class Saved:
    """An encoder, the directory it was loaded from, and the untouched module to compare with."""

    def __init__(self, name, directory):
        torch.manual_seed(0)
        self.directory = directory
        *model, (self.temporal, self.spatial, self.channels) = SAVED[name]
        if name == "ours":
            self.module = with_random_weights(CausalVae(OURS)).eval()
            save_checkpoint(directory, self.module, Normaliser((0.0,) * 4, (1.0,) * 4))
        else:
            class_name, config = model
            self.module = getattr(diffusers, class_name)(**config).eval()
            if "LTX" in class_name:
                self.module.latents_mean += torch.arange(8.0)
                self.module.latents_std *= 3.0
            self.module.save_pretrained(directory)
        self.encoder = load_encoder(str(directory))

    def clip(self, latent_frames, batch=1):
        generator = torch.Generator().manual_seed(1)
        shape = (batch, 1 + self.temporal * (latent_frames - 1), self.spatial, 2 * self.spatial, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def whole(self, clip):
        """The module's own answer, from the pixels as the field scales them: [-1, 1]."""
        pixels = clip.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.inference_mode():
            encoded = self.module.encode(pixels)
        posterior = getattr(encoded, "latent_dist", encoded)
        return posterior.mean, posterior.logvar


@pytest.fixture(scope="module", params=sorted(SAVED))
def saved(request, tmp_path_factory):
    return Saved(request.param, tmp_path_factory.mktemp("encoder") / request.param)


@pytest.fixture(scope="module")
def ltx(tmp_path_factory):
    return Saved("ltx-0.9", tmp_path_factory.mktemp("encoder") / "ltx")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return Saved("wan-2.1", tmp_path_factory.mktemp("encoder") / "wan")


def difference_std(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize("strides_per_chunk", [None, 1, 3])
def test_streamed_latents_are_the_whole_clips(saved, strides_per_chunk):
    clip = saved.clip(latent_frames=5)
    chunk_frames = strides_per_chunk and strides_per_chunk * saved.temporal
    posterior = saved.encoder.encode(clip, chunk_frames=chunk_frames)
    mean, logvar = saved.whole(clip)
    assert tuple(mean.shape[1:]) == saved.encoder.card.geometry.latent_shape(*clip.shape[1:4])
    assert difference_std(posterior.mean, mean) <= 1e-5
    assert difference_std(posterior.logvar, logvar) <= 1e-5
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32


def test_geometry_is_as_the_family_says(saved):
    geometry = saved.encoder.card.geometry
    assert (geometry.temporal_stride, geometry.spatial_stride, geometry.channels) == (
        *(saved.temporal, saved.spatial, saved.channels),
    )
    assert geometry.leading_frame
    assert geometry.causality == "causal"


def test_later_frames_leave_no_trace(saved):
    clip = saved.clip(latent_frames=4)
    changed = clip.clone()
    changed[:, 1 + saved.temporal :] = 7
    before, after = saved.encoder.encode(clip).mean, saved.encoder.encode(changed).mean
    if saved.temporal == 8:  # the changed frames start a chunk of their own, so not even rounding may differ
        assert torch.equal(before[:, :, :2], after[:, :, :2])
    before = saved.encoder.encode(clip, chunk_frames=saved.temporal).mean
    after = saved.encoder.encode(changed, chunk_frames=saved.temporal).mean
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_bits_do_not_depend_on_the_clips_length(saved):
    clip = saved.clip(latent_frames=6)
    long = saved.encoder.encode(clip)
    for latent_frames in (1, 2, 4):
        short = saved.encoder.encode(clip[:, : 1 + saved.temporal * (latent_frames - 1)])
        assert torch.equal(short.mean[:, :, :1], long.mean[:, :, :1])
        # A filled chunk holds other late frames, but the arithmetic of the early ones is the same.
        assert torch.equal(short.mean, long.mean[:, :, :latent_frames])
        assert torch.equal(short.logvar, long.logvar[:, :, :latent_frames])


def test_a_batch_equals_its_clips(saved):
    clips = saved.clip(latent_frames=2, batch=2)
    one_by_one = torch.cat([saved.encoder.encode(clip[None]).mean for clip in clips])
    assert difference_std(saved.encoder.encode(clips).mean, one_by_one) <= 1e-5


def test_an_encoder_is_as_new_after_an_error_and_between_clips(saved):
    clip = saved.clip(latent_frames=2)
    first = saved.encoder.encode(clip).mean
    with pytest.raises(GeometryError):
        saved.encoder.encode(clip[:, :-1])
    saved.encoder.encode(255 - clip)
    assert torch.equal(saved.encoder.encode(clip).mean, first)


@pytest.mark.parametrize("saved", [name for name in sorted(SAVED) if "ltx" not in name], indirect=True)
def test_encoders_that_say_so_are_shared_between_threads(saved):
    clips = [saved.clip(latent_frames=5), 255 - saved.clip(latent_frames=5)]
    serial = [saved.encoder.encode(clip, chunk_frames=saved.temporal).mean for clip in clips]
    serial_frames = [saved.encoder.decode(latents) for latents in serial]

    def work(index):
        latents = saved.encoder.encode(clips[index], chunk_frames=saved.temporal).mean
        return latents, saved.encoder.decode(latents)

    with ThreadPoolExecutor(2) as pool:
        for index, (latents, frames) in zip([0, 1] * 3, pool.map(work, [0, 1] * 3), strict=True):
            assert difference_std(latents, serial[index]) <= 1e-5
            assert (frames.float() - serial_frames[index].float()).abs().max() <= 1


def test_decode_is_the_modules_own_and_repeatable(saved):
    latent = saved.encoder.encode(saved.clip(latent_frames=3)).mean
    frames = saved.encoder.decode(latent)
    assert frames.dtype == torch.uint8
    assert frames.shape == saved.clip(latent_frames=3).shape
    assert torch.equal(frames, saved.encoder.decode(latent))
    if getattr(saved.module.config, "timestep_conditioning", False):
        return  # that decoder adds noise: diffusers' own answer is another one each time
    with torch.inference_mode():
        decoded = saved.module.decode(latent)
    pixels = getattr(decoded, "sample", decoded)
    expected = ((pixels + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 4, 1)
    assert (frames.float() - expected).abs().max() <= 1
    assert (frames.float() != expected).float().mean() < 1e-2


def test_what_is_off_the_grid_is_refused_with_the_nearest_sizes(saved):
    encoder, temporal, spatial = saved.encoder, saved.temporal, saved.spatial
    clip = saved.clip(latent_frames=2)
    with pytest.raises(GeometryError, match=rf"use 1 or {1 + temporal}"):
        encoder.encode(clip[:, :-1])
    with pytest.raises(GeometryError, match=rf"width {2 * spatial - 1} .*use {spatial} or {2 * spatial}"):
        encoder.encode(clip[:, :, :, :-1])
    with pytest.raises(GeometryError, match=f"chunk_frames 6 is not a multiple of {temporal}"):
        encoder.encode(clip, chunk_frames=6)
    with pytest.raises(GeometryError, match="uint8 B T H W 3"):
        encoder.encode(clip.float())
    with pytest.raises(GeometryError, match=f"latents are B {saved.channels} t h w"):
        encoder.decode(torch.zeros(1, saved.channels + 1, 1, 1, 1))


def test_describing_agrees_with_loading(saved):
    assert describe(str(saved.directory)) == saved.encoder.card
    assert saved.encoder.card.pixel_range == (-1.0, 1.0)


def test_bfloat16_is_near_float32(saved):
    clip = saved.clip(latent_frames=2)
    latents = load_encoder(str(saved.directory), compute_dtype="bfloat16").encode(clip).mean
    assert latents.dtype == torch.float32
    assert 0 < difference_std(latents, saved.encoder.encode(clip).mean) < 0.1


def test_normalisers_are_read_as_the_pipelines_apply_them(wan, ltx):
    latent = torch.randn(1, 8, 2, 1, 1)
    normaliser = ltx.encoder.card.normaliser
    expected = (
        (latent - ltx.module.latents_mean.view(1, -1, 1, 1, 1)) * 0.5 / ltx.module.latents_std.view(1, -1, 1, 1, 1)
    )
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (normaliser.mean, normaliser.std))
    torch.testing.assert_close((latent - mean) / std, expected)
    assert wan.encoder.card.normaliser.mean == (0.1, 0.2, 0.3, 0.4)
    assert wan.encoder.card.normaliser.std == (1.0, 2.0, 3.0, 4.0)


def test_the_fingerprint_is_of_what_changes_a_latent(wan, ltx, tmp_path):
    def refingerprint(saved, name):
        saved.module.save_pretrained(tmp_path / name)
        return describe(str(tmp_path / name)).fingerprint

    original = ltx.encoder.card.fingerprint
    ltx.module.latents_mean += 1.0
    assert refingerprint(ltx, "normaliser") == original
    with torch.no_grad():
        ltx.module.encoder.conv_in.conv.bias[0] += 1e-3
    assert refingerprint(ltx, "weights") != original
    assert wan.encoder.card.fingerprint != original


def test_a_pipeline_directory_is_entered(wan, tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "pipeline" / "vae").symlink_to(wan.directory)
    assert load_encoder(str(tmp_path / "pipeline")).card == wan.encoder.card
    assert resolve_source(str(tmp_path / "pipeline"), "vae") == tmp_path / "pipeline" / "vae"


def test_an_unknown_class_is_refused_with_the_list(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLCogVideoX"}))
    with pytest.raises(EncoderSourceError, match=r"CogVideoX is not supported.*KLLTXVideo, AutoencoderKLWan"):
        describe(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("{", CheckpointError, "cannot be read as JSON"),
        ("{}", EncoderSourceError, "neither a model of ours nor of diffusers"),
        ('{"_class_name": "AutoencoderKLWan"}', CheckpointError, "temperal_downsample"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, config, error, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(error, match=message) as caught:
        describe(str(tmp_path))
    assert "config.json" in str(caught.value)


def test_weights_that_are_cut_short_are_refused(wan, tmp_path):
    wan.module.save_pretrained(tmp_path / "cut")
    path = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut short"):
        load_encoder(str(tmp_path / "cut"))


def test_weights_that_miss_a_tensor_are_not_filled_with_noise(wan, tmp_path):
    from safetensors.torch import load_file, save_file

    wan.module.save_pretrained(tmp_path / "missing")
    path = tmp_path / "missing" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["encoder.conv_in.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.bias"):
        load_encoder(str(tmp_path / "missing"))


def test_the_probe_refuses_a_geometry_that_the_model_does_not_have(wan, monkeypatch):
    from models import diffusers_directory
    from models.spec import Geometry

    rule = diffusers_directory.RULES["AutoencoderKLWan"]
    wrong = type(rule)(lambda _: Geometry(4, 16, 4), rule.normaliser, rule.backend, rule.normaliser_fields)
    monkeypatch.setattr(diffusers_directory, "RULES", {"AutoencoderKLWan": wrong})
    with pytest.raises(EncoderProbeError, match="where its config promises"):
        load_encoder(str(wan.directory))


def test_the_probe_refuses_a_stream_that_changes_latents(ltx, monkeypatch):
    """As if a new diffusers did its temporal padding elsewhere: without the tails every chunk starts a clip."""
    monkeypatch.setattr("models.ltx._StreamedConv.starts_clip", property(lambda _: True))
    with pytest.raises(EncoderProbeError):
        load_encoder(str(ltx.directory))


def test_hub_sources_fetch_the_vae_alone(wan, tmp_path, monkeypatch):
    asked = {}

    def fake_download(repository, allow_patterns):
        asked.update(repository=repository, files=allow_patterns)
        return str(tmp_path)

    (tmp_path / "vae").symlink_to(wan.directory)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    assert resolve_source("owner/name") == tmp_path / "vae"
    assert asked["repository"] == "owner/name"
    assert "vae/config.json" in asked["files"]
    assert all(name.startswith("vae/") for name in asked["files"])
    with pytest.raises(EncoderSourceError, match=r"has no config\.json"):
        resolve_source("owner/name", subfolder="")


def test_sources_that_are_nothing_are_refused(tmp_path, monkeypatch):
    def offline(repository, allow_patterns):
        raise FileNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(EncoderSourceError, match="no such directory here, and the hub did not give it: offline"):
        resolve_source("owner/name")
    with pytest.raises(EncoderSourceError, match="no such directory, and not a hub id"):
        resolve_source(str(tmp_path / "absent"))
    with pytest.raises(EncoderSourceError, match=r"no config\.json in .* or .*vae"):
        resolve_source(str(tmp_path))
    with pytest.raises(EncoderSourceError, match="compute_dtype 'int8' is not one of float32, bfloat16"):
        load_encoder(str(tmp_path), compute_dtype="int8")


def test_without_diffusers_the_error_says_what_to_install(wan, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(EncoderSourceError, match=r"needs diffusers: pip install 'latentmill\[diffusers\]'"):
        load_encoder(str(wan.directory))
