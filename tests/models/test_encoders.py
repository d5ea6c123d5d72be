"""Finding, describing and loading an encoder: sources, damaged files, fingerprints, and the probe at loading."""

import dataclasses
import json
import sys
import types

import huggingface_hub
import pytest

pytest.importorskip("diffusers")

import torch

from models.encoders import describe, load_encoder, resolve_source
from models.errors import CheckpointError, EncoderProbeError, EncoderSourceError
from models.pretrained import directory
from models.spec import Geometry
from tests.pretrained_models import STREAMED, WHOLE, Saved


@pytest.fixture(scope="module")
def ltx(tmp_path_factory):
    return Saved(STREAMED["ltx-0.9"], tmp_path_factory.mktemp("encoder") / "ltx")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return Saved(STREAMED["wan-2.1"], tmp_path_factory.mktemp("encoder") / "wan")


@pytest.fixture(scope="module")
def mochi(tmp_path_factory):
    return Saved(WHOLE["mochi"], tmp_path_factory.mktemp("encoder") / "mochi")


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
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLAllegro"}))
    with pytest.raises(EncoderSourceError, match=r"Allegro is not supported.*KLLTXVideo, .*AutoencoderKLWan"):
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


@pytest.mark.parametrize("name", ["wan", "mochi"])
def test_the_probe_refuses_a_geometry_that_the_model_does_not_have(request, name, monkeypatch):
    saved = request.getfixturevalue(name)
    class_name = saved.case.class_name
    wrong = dataclasses.replace(directory.RULES[class_name], geometry=lambda _: Geometry(4, 16, 4))
    monkeypatch.setattr(directory, "RULES", {class_name: wrong})
    with pytest.raises(EncoderProbeError, match="where its config promises"):
        load_encoder(str(saved.directory))


def test_the_probe_refuses_a_stream_that_changes_latents(ltx, monkeypatch):
    """As if a new diffusers did its temporal padding elsewhere: without the tails every chunk starts a clip."""
    monkeypatch.setattr("models.pretrained.ltx._StreamedConv.starts_clip", property(lambda _: True))
    with pytest.raises(EncoderProbeError):
        load_encoder(str(ltx.directory))


def test_the_probe_names_a_diffusers_that_works_otherwise(wan, monkeypatch):
    def renamed(self, pixels, state):
        raise AttributeError("feat_cache")

    monkeypatch.setattr("models.pretrained.wan.WanBackend.encode_chunk", renamed)
    with pytest.raises(EncoderProbeError, match=r"diffusers .* cannot encode in chunks: feat_cache"):
        load_encoder(str(wan.directory))


def test_a_class_that_this_diffusers_lacks_is_named(wan, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(__version__="0.30.0"))
    with pytest.raises(EncoderSourceError, match=r"diffusers 0.30.0 has no AutoencoderKLWan: pip install"):
        load_encoder(str(wan.directory))


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


class Hub:
    """A repository on the hub: of its files a snapshot has those that were asked for."""

    def __init__(self, repository, snapshot):
        self.repository, self.snapshot, self.asked = repository, snapshot, []
        snapshot.mkdir()

    def download(self, _, allow_patterns):
        self.asked.append(allow_patterns)
        for name in allow_patterns:
            if (self.repository / name).is_file():
                (self.snapshot / name).write_bytes((self.repository / name).read_bytes())
        return str(self.snapshot)


def test_a_hub_repository_without_a_vae_folder_is_taken_by_its_root(wan, tmp_path, monkeypatch):
    hub = Hub(wan.directory, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    assert resolve_source("owner/name") == tmp_path / "snapshot"
    assert describe("owner/name") == wan.encoder.card


def test_the_weights_of_another_model_at_its_root_are_not_downloaded(tmp_path, monkeypatch):
    (tmp_path / "repository").mkdir()
    hub = Hub(tmp_path / "repository", tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    with pytest.raises(EncoderSourceError, match=r"has no vae/config.json and no config.json: download the folder"):
        describe("owner/name")
    (tmp_path / "repository" / "config.json").write_text('{"_class_name": "WanModel"}')
    with pytest.raises(EncoderSourceError, match="WanModel is not supported"):
        describe("owner/name")
    assert [files for files in hub.asked if "model.safetensors" in files] == []


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
