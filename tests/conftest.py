"""Fixtures that more than one test folder needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from models.autoencoder import CausalAutoencoder
from models.checkpoint import save_checkpoint
from models.config import ModelConfig, preset
from models.spec import Normaliser

os.environ["RAY_AUTH_MODE"] = "disabled"  # else a local cluster writes a token under the home directory
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

# Machines that run tests are busy; a slow example is no failure.
settings.register_profile("latentmill", deadline=None)
settings.load_profile("latentmill")


@pytest.fixture(scope="session")
def vae_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our tiny VAE with random weights, saved as `train` saves it."""
    torch.manual_seed(0)
    model = CausalAutoencoder(ModelConfig(preset("tiny-4x8x8x16"))).eval()
    directory = tmp_path_factory.mktemp("encoder") / "vae"
    save_checkpoint(directory, model, Normaliser((0.0,) * 16, (1.0,) * 16))
    return directory


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    """Commands and encode workers set the number of threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One cluster on this machine for all tests that do not kill it."""
    import logging

    import ray

    ray.init(num_cpus=6, object_store_memory=400 << 20, include_dashboard=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
