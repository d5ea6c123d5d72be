"""LPIPS with random weights: what holds for any weights, and which files are taken."""

import pytest
import torch
from safetensors.torch import save_file

from models.errors import CheckpointError
from models.kinds.ae import Ae
from models.losses import ReconstructionWeights
from models.lpips import NETWORKS, Lpips, load_lpips
from models.train_settings import TrainSettings
from models.trainer import Trainer
from models.training import random_objective
from tests.backbones import NARROW
from tests.moving_shapes import shapes_pixels


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return {name: Lpips(network) for name, network in NETWORKS.items()}


@pytest.fixture(scope="module")
def files(networks, tmp_path_factory):
    paths = {}
    for name, network in networks.items():
        paths[name] = tmp_path_factory.mktemp("lpips") / f"{name}.safetensors"
        save_file(network.parameters_by_name(), paths[name])
    return paths


@pytest.mark.parametrize("name", NETWORKS)
class TestDistance:
    def test_is_zero_for_equal_pictures_and_grows_with_their_difference(self, networks, name):
        pixels = shapes_pixels(batch=1, frames=2)
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        distances = [networks[name](pixels + scale * noise, pixels).item() for scale in (0.0, 0.1, 0.4)]
        assert distances[0] == 0.0 < distances[1] < distances[2]

    def test_is_a_mean_over_clips_and_frames(self, networks, name):
        pixels, other = shapes_pixels(batch=2, frames=2), shapes_pixels(seed=1, batch=2, frames=2)
        each = [
            networks[name](pixels[b : b + 1, :, t : t + 1], other[b : b + 1, :, t : t + 1]).item()
            for b in range(2)
            for t in range(2)
        ]
        assert networks[name](pixels, other).item() == pytest.approx(sum(each) / 4, rel=1e-4)

    def test_its_gradient_reaches_the_reconstruction_and_no_weight(self, networks, name):
        pixels = shapes_pixels(batch=1, frames=1)
        reconstruction = torch.zeros_like(pixels).requires_grad_()
        networks[name](reconstruction, pixels).backward()
        assert reconstruction.grad.isfinite().all()
        assert reconstruction.grad.abs().sum() > 0
        assert all(weight.grad is None for weight in networks[name].parameters())

    def test_black_out_features_have_a_gradient(self, networks, name):
        """Rectified to nothing everywhere, the features have no direction; their gradient must not be NaN."""
        network = Lpips(NETWORKS[name])
        for conv in network.convs:
            conv.bias.fill_(-100.0)
        reconstruction = torch.zeros(1, 3, 1, 32, 32, requires_grad=True)
        network(reconstruction, torch.ones(1, 3, 1, 32, 32)).backward()
        assert reconstruction.grad.isfinite().all()

    def test_a_file_comes_back(self, networks, files, name):
        pixels, other = shapes_pixels(batch=1, frames=1), shapes_pixels(seed=1, batch=1, frames=1)
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        loaded = load_lpips(files[name])
        assert torch.equal(torch.rand(1), expected)
        assert torch.equal(loaded(pixels, other), networks[name](pixels, other))

    def test_a_file_of_another_network_is_refused_by_tensor(self, networks, name, tmp_path):
        path = tmp_path / "wrong.safetensors"
        for change in ("lack", "surplus", "shape"):
            weights = networks[name].parameters_by_name()
            if change == "lack":
                del weights["lin2.model.1.weight"]
            elif change == "surplus":
                weights["classifier.0.weight"] = torch.zeros(1)
            else:
                weights["features.0.bias"] = torch.zeros(3)
            save_file(weights, path)
            with pytest.raises(CheckpointError, match=rf"wrong\.safetensors: is no LPIPS .* {name}.*1 in all"):
                load_lpips(path)


def test_small_or_unequal_pictures_are_refused(networks):
    for found, wanted in (((1, 3, 1, 16, 32), (1, 3, 1, 16, 32)), ((1, 3, 1, 32, 32), (1, 3, 2, 32, 32))):
        with pytest.raises(ValueError, match="at least 32 pixels a side"):
            networks["AlexNet"](torch.zeros(found), torch.zeros(wanted))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors: cannot be read"):
        load_lpips(tmp_path / "none.safetensors")


def test_training_lowers_it_and_leaves_its_weights_alone(files, networks):
    weights = ReconstructionWeights(l1=0.0, haar=0.0, lpips=1.0, lpips_weights=files["AlexNet"])
    objective = random_objective(Ae(weights=weights), NARROW, seed=0)
    trainer = Trainer(objective, TrainSettings(learning_rate=2e-3, warmup_steps=0))
    pixels = shapes_pixels(batch=2, frames=1)
    losses = [trainer.train_step(pixels)["lpips"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    for name, weight in networks["AlexNet"].parameters_by_name().items():
        assert torch.equal(objective.lpips.parameters_by_name()[name], weight)
