import numpy as np
import pytest
import torch

from models.bottlenecks.config import Kl, ResidualVq
from models.build import build_model
from models.config import ModelConfig
from models.training_statistics import code_statistics, grouped, latent_statistics
from tests.backbones import NARROW


def test_what_is_about_codes_has_a_group_of_its_own() -> None:
    losses = {"loss": 3.0, "l1": 0.5, "commitment": 0.1, "usage": 0.9, "top_window_perplexity": 7.0}
    assert grouped(losses) == {
        "loss/loss": 3.0,
        "loss/l1": 0.5,
        "loss/commitment": 0.1,
        "code/usage": 0.9,
        "code/top_window_perplexity": 7.0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_statistics_are_those_of_its_channels(dtype: torch.dtype) -> None:
    latent = torch.randn(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    scale, shift = torch.tensor([1.0, 4.0, 0.5, 0.0, 2.0]), torch.tensor([0.0, -300.0, 7.0, 40.0, 1.0])
    latent = (latent * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)).to(dtype)
    values = latent.double().numpy()
    mean, std = values.mean(axis=(0, 2, 3, 4)), values.std(axis=(0, 2, 3, 4))
    assert latent_statistics(latent) == pytest.approx(
        {
            "latent/mean_min": mean[1],
            "latent/mean_max": mean[3],
            "latent/std_min": 0.0,
            "latent/std_median": np.median(std),
            "latent/std_max": std[1],
            "latent/abs_max": np.abs(values).max(),
        },
        abs=1e-9,
    )


def test_each_codebook_tells_of_itself() -> None:
    config = ModelConfig(NARROW, ResidualVq(num_quantisers=2, codebook_size=8))
    model = build_model(config)
    assert code_statistics(model) == {
        "code/codebook_0_window_usage": 0.0,
        "code/codebook_0_window_perplexity": 1.0,
        "code/codebook_1_window_usage": 0.0,
        "code/codebook_1_window_perplexity": 1.0,
    }
    used = model.bottleneck.codebooks[1].usage
    used(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]))
    assert code_statistics(model) == pytest.approx(
        {
            "code/codebook_0_window_usage": 0.0,
            "code/codebook_0_window_perplexity": 1.0,
            "code/codebook_1_window_usage": 0.5,
            "code/codebook_1_window_perplexity": 4.0,
        }
    )


def test_a_continuous_latent_has_no_codes() -> None:
    assert code_statistics(build_model(ModelConfig(NARROW, Kl()))) == {}
