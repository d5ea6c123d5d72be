"""Checkpoints: what is saved comes back, and nothing that was changed is taken."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.autoencoder import CausalAutoencoder
from models.bottlenecks.config import Fsq, Lfq, Vq
from models.checkpoint import load_checkpoint, read_document, save_checkpoint
from models.config import BackboneConfig, ModelConfig, Pyramid
from models.errors import CheckpointError
from models.spec import Normaliser

CONFIG = ModelConfig(BackboneConfig(2, ((2, 2),), Pyramid((8, 16), 1), Pyramid((8, 8), 1), latent_channels=4))
NORMALISER = Normaliser(mean=(0.1, -0.2, 0.3, 1 / 3), std=(1.0, 2.0, 0.5, 1e-3), formula="(latent - mean) / std")


@pytest.fixture
def model():
    torch.manual_seed(3)
    return CausalAutoencoder(CONFIG)


@pytest.fixture
def directory(tmp_path, model):
    save_checkpoint(tmp_path / "vae", model, NORMALISER)
    return tmp_path / "vae"


def test_a_checkpoint_comes_back_bit_for_bit(directory, model):
    loaded, document = load_checkpoint(directory)
    assert document.config == CONFIG
    assert document.normaliser == NORMALISER
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    clip = torch.rand(1, 3, 5, 8, 8)
    with torch.inference_mode():
        assert torch.equal(loaded.encode(clip).mean, model.encode(clip).mean)
    _, state = loaded.encode_chunk(clip, {})
    assert len(state) == sum(name.endswith("conv.weight") for name in loaded.encoder.state_dict())


@pytest.mark.parametrize("bottleneck", [Fsq(levels=(8, 5, 5, 5)), Lfq(), Vq(codebook_size=8)], ids=lambda it: it.name)
def test_what_no_file_holds_is_there_again(tmp_path, bottleneck):
    """Constants that follow from the config; loading builds once, on a device without values."""
    model = CausalAutoencoder(dataclasses.replace(CONFIG, bottleneck=bottleneck))
    save_checkpoint(tmp_path / "model", model, NORMALISER)
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    loaded, _ = load_checkpoint(tmp_path / "model")
    assert torch.equal(torch.rand(1), expected)
    with torch.device("meta"):
        built = CausalAutoencoder(model.config).bottleneck
    constants = {name: buffer for name, buffer in built.named_buffers() if name not in built.state_dict()}
    assert list(constants) == ([] if bottleneck.name == "vq" else ["levels"])
    assert not any(constant.is_meta for constant in constants.values())
    latent = loaded.encode(torch.rand(1, 3, 5, 8, 8)).mean
    ids = loaded.bottleneck.latent_to_ids(latent)
    assert torch.equal(ids, model.bottleneck.latent_to_ids(latent))
    assert torch.equal(loaded.bottleneck.ids_to_latent(ids), latent)


def test_loading_draws_no_random_numbers(directory):
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    load_checkpoint(directory)
    assert torch.equal(torch.rand(1), expected)


def test_the_fingerprint_is_of_weights_and_config_alone(tmp_path, model):
    first = save_checkpoint(tmp_path / "first", model, NORMALISER)
    other_normaliser = dataclasses.replace(NORMALISER, mean=(0.0, 0.0, 0.0, 0.0))
    assert save_checkpoint(tmp_path / "same", model, other_normaliser) == first
    assert read_document(tmp_path / "first").fingerprint == first
    with torch.no_grad():
        model.decoder.conv_out.conv.bias[0] += 1e-6
    assert save_checkpoint(tmp_path / "weights", model, NORMALISER) != first
    torch.manual_seed(3)
    wider = CausalAutoencoder(
        dataclasses.replace(CONFIG, backbone=dataclasses.replace(CONFIG.backbone, decoder=Pyramid((8, 16), 1)))
    )
    assert save_checkpoint(tmp_path / "config", wider, NORMALISER) != first


def test_a_directory_is_never_overwritten(directory, model):
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(directory, model, NORMALISER)


def test_a_failed_save_leaves_nothing(tmp_path, model, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "vae", model, NORMALISER)
    assert list(tmp_path.iterdir()) == []


def test_a_normaliser_of_another_width_is_not_saved(tmp_path, model):
    with pytest.raises(CheckpointError, match="has 1 channels, the model 4"):
        save_checkpoint(tmp_path / "vae", model, Normaliser((0.0,), (1.0,)))


@pytest.mark.parametrize("at", [0, 20, -1])
def test_flipped_weights_are_refused(directory, at):
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(directory)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_weights_are_refused(directory, kept):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(directory)


def test_a_weight_under_another_name_is_refused(directory):
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.conv.wait"] = weights.pop("encoder.conv_in.conv.weight")
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="fingerprint differs"):
        load_checkpoint(directory)


def test_another_models_weights_are_refused_by_name(tmp_path, directory, model, monkeypatch):
    """Weights and config that agree on a fingerprint, but not on the tensors that the config builds."""
    weights = load_file(directory / "model.safetensors")
    weights["encoder.conv_in.conv.bias"] = torch.zeros(3)
    model.state_dict = lambda: weights
    save_checkpoint(tmp_path / "crafted", model, NORMALISER)
    with pytest.raises(CheckpointError, match=r"does not fit its config at encoder\.conv_in\.conv\.bias \(1 in all\)"):
        load_checkpoint(tmp_path / "crafted")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: No such file"):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, 'lacks "format": "latentmill.model"'),
        ({"format_version": 99}, "format version 99; this code reads 2"),
        ({"normaliser": {"mean": [0.0], "std": [1.0], "formula": ""}}, "does not match its own sha256"),
        ({"kind": "Other"}, "does not match its own sha256"),
    ],
)
def test_a_changed_config_is_refused(directory, change, message):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message) as error:
        read_document(directory)
    assert str(path) in str(error.value)


def test_a_pickle_is_refused_unread(directory):
    torch.save({"weight": torch.zeros(1)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_checkpoint(directory)
