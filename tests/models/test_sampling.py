"""Latents from the priors that a model has: their statistics, their codes, and the refusal of those it has not."""

import dataclasses

import pytest
import torch

from models.autoencoder import CausalAutoencoder
from models.bottlenecks.config import BottleneckConfig, Fsq, Gumbel, Kl, Lfq, NoBottleneck, ResidualVq, Vq
from models.build import build_model
from models.config import ModelConfig
from models.generative.codes import code_extents, codebook_sizes, grids_to_latent, latent_to_grids
from models.generative.prior import CodePrior
from models.generative.prior_config import PriorConfig
from models.generative.sampling import prior_names, sample_latents
from models.kinds.vq_vae_2 import VqVae2
from models.spec import GeometryError, Normaliser
from tests.backbones import NARROW

CLIP = (5, 16, 16)
NORMALISER = Normaliser((1.0, -2.0, 0.0, 3.0), (0.1, 1.0, 2.0, 0.5))
DISCRETE = {
    "vq": Vq(codebook_size=8),
    "residual_vq": ResidualVq(codebook_size=8, num_quantisers=3),
    "fsq": Fsq(levels=(5, 4, 3, 3)),
    "lfq": Lfq(),
    "gumbel": Gumbel(codebook_size=16),
}


def model_of(bottleneck: BottleneckConfig) -> CausalAutoencoder:
    torch.manual_seed(0)
    return build_model(ModelConfig(NARROW, bottleneck)).eval().requires_grad_(False)


def two_levels() -> CausalAutoencoder:
    torch.manual_seed(0)
    return build_model(VqVae2(bottleneck=Vq(codebook_size=8)).model_config(NARROW)).eval().requires_grad_(False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestGaussians:
    def test_gaussian_is_the_unit_one(self) -> None:
        latents = sample_latents(model_of(Kl()), NORMALISER, "gaussian", 200, CLIP, generator=seeded())
        assert latents.shape == (200, 4, 3, 4, 4)
        torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), atol=0.05, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(4), atol=0.05, rtol=0)

    def test_aggregate_has_the_normalisers_statistics(self) -> None:
        latents = sample_latents(model_of(NoBottleneck()), NORMALISER, "aggregate", 200, CLIP, generator=seeded())
        mean, std = torch.tensor(NORMALISER.mean), torch.tensor(NORMALISER.std)
        torch.testing.assert_close((latents.mean((0, 2, 3, 4)) - mean) / std, torch.zeros(4), atol=0.05, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3, 4)) / std, torch.ones(4), atol=0.05, rtol=0)

    @pytest.mark.parametrize("prior", ["gaussian", "aggregate"])
    def test_temperature_scales_the_spread_alone(self, prior: str) -> None:
        model = model_of(Kl())
        one, half = (
            sample_latents(model, NORMALISER, prior, 2, CLIP, temperature=temperature, generator=seeded())
            for temperature in (1.0, 0.5)
        )
        mean = torch.tensor(NORMALISER.mean if prior == "aggregate" else (0.0,) * 4).view(1, -1, 1, 1, 1)
        torch.testing.assert_close(half - mean, 0.5 * (one - mean))

    def test_a_seed_repeats_and_another_differs(self) -> None:
        one, same, other = (
            sample_latents(model_of(Kl()), NORMALISER, "gaussian", 1, CLIP, generator=seeded(seed))
            for seed in (1, 1, 2)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


class TestCodes:
    @pytest.mark.parametrize("name", DISCRETE)
    def test_uniform_codes_are_codes_of_the_model(self, name: str) -> None:
        model = model_of(DISCRETE[name])
        latents = sample_latents(model, NORMALISER, "uniform", 400, CLIP, generator=seeded())
        assert latents.shape == (400, 4, 3, 4, 4)
        (ids,) = latent_to_grids(model, latents.half())
        torch.testing.assert_close(grids_to_latent(model, [ids]), latents)
        ((*sizes,),) = codebook_sizes(model)
        for book, size in enumerate(sizes):
            shares = torch.bincount(ids[:, book].flatten(), minlength=size) / ids[:, book].numel()
            assert shares.min() > 0.4 / size
            assert shares.max() < 1.8 / size

    def test_two_levels(self) -> None:
        model = two_levels()
        extents = code_extents(model.config, *CLIP)
        assert extents == ((2, 2, 2), (3, 4, 4))
        latents = sample_latents(model, NORMALISER, "uniform", 2, CLIP, generator=seeded())
        grids = latent_to_grids(model, latents.half())
        assert [tuple(grid.shape) for grid in grids] == [(2, 1, 2, 2, 2), (2, 1, 3, 4, 4)]
        assert torch.equal(grids_to_latent(model, grids), latents)
        assert model.decode(latents).shape == (2, 3, *CLIP)

    @pytest.mark.parametrize("name", [*DISCRETE, "two levels"])
    def test_a_learned_prior_decides(self, name: str) -> None:
        """One whose last layer loves one code of each codebook."""
        model = two_levels() if name == "two levels" else model_of(DISCRETE[name])
        prior = CodePrior(PriorConfig(codebook_sizes(model), code_extents(model.config, *CLIP), 16, 1, 2)).eval()
        with torch.no_grad():
            prior.to_logits.bias[torch.tensor(prior.first_code) + 1] = 50.0
        latents = sample_latents(model, NORMALISER, prior, 2, CLIP, generator=seeded())
        assert all((grid == 1).all() for grid in latent_to_grids(model, latents))
        assert model.decode(latents).shape == (2, 3, *CLIP)

    def test_temperature_and_top_k_reach_the_learned_prior(self) -> None:
        model = model_of(DISCRETE["vq"])
        prior = CodePrior(PriorConfig(codebook_sizes(model), code_extents(model.config, *CLIP), 16, 1, 2)).eval()
        with torch.no_grad():
            prior.to_logits.bias.copy_(torch.arange(8.0))
        for options, used in (
            ({"temperature": 0.01}, {7}),
            ({"top_k": 2}, {6, 7}),
            ({"temperature": 99.0}, set(range(8))),
        ):
            latents = sample_latents(model, NORMALISER, prior, 4, CLIP, generator=seeded(), **options)
            assert set(latent_to_grids(model, latents)[0].unique().tolist()) == used


class TestRefusals:
    def test_the_priors_of_each_model(self) -> None:
        assert prior_names(model_of(Kl())) == ("gaussian", "aggregate")
        assert prior_names(model_of(NoBottleneck())) == ("aggregate",)
        assert prior_names(model_of(DISCRETE["fsq"])) == prior_names(two_levels()) == ("uniform",)

    @pytest.mark.parametrize(
        ("bottleneck", "prior", "options", "told"),
        [
            (Kl(), "uniform", {}, "has no prior 'uniform': use gaussian or aggregate"),
            (NoBottleneck(), "gaussian", {}, "with bottleneck none has no prior 'gaussian': use aggregate"),
            (DISCRETE["vq"], "aggregate", {}, "use uniform"),
            (DISCRETE["vq"], "uniform", {"temperature": 0.5}, "uniform codes have no temperature"),
            (DISCRETE["vq"], "uniform", {"top_k": 3}, "top_k chooses among the codes of a learned prior"),
            (Kl(), "gaussian", {"top_k": 3}, "top_k chooses"),
            (Kl(), "gaussian", {"temperature": 0.0}, "temperature must be positive"),
            (Kl(), CodePrior(PriorConfig(((8,),), ((3, 4, 4),), 16, 1, 2)), {}, "does not fit a vae"),
            (DISCRETE["vq"], CodePrior(PriorConfig(((9,),), ((3, 4, 4),), 16, 1, 2)), {}, "does not fit a"),
            (DISCRETE["vq"], CodePrior(PriorConfig(((8,),), ((3, 4, 3),), 16, 1, 2)), {}, "3x4x4 does not fit into"),
        ],
    )
    def test_what_a_model_or_prior_has_not(
        self, bottleneck: BottleneckConfig, prior: str | CodePrior, options: dict, told: str
    ) -> None:
        with pytest.raises(ValueError, match=told):
            sample_latents(model_of(bottleneck), NORMALISER, prior, 1, CLIP, **options)

    @pytest.mark.parametrize("bottleneck", [Kl(), DISCRETE["vq"]])
    def test_a_clip_off_the_grid(self, bottleneck: BottleneckConfig) -> None:
        model = model_of(bottleneck)
        with pytest.raises(GeometryError, match="height 17"):
            sample_latents(model, NORMALISER, prior_names(model)[0], 1, (5, 17, 16))

    def test_a_continuous_model_has_no_codes(self) -> None:
        with pytest.raises(TypeError, match="with bottleneck kl has no codes"):
            codebook_sizes(model_of(Kl()))


def test_extents_follow_from_the_block_list() -> None:
    config = ModelConfig(dataclasses.replace(NARROW, downs=((1, 2),)), Vq(codebook_size=8))
    assert code_extents(config, 4, 16, 8) == ((4, 4, 2),)
