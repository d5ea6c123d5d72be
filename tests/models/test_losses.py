"""Losses against values worked out by hand, and the normaliser against a direct computation."""

from pathlib import Path

import pytest
import torch
from torch.distributions import Laplace, SigmoidTransform, TransformedDistribution

from models.losses import (
    ReconstructionWeights,
    haar_pyramid_loss,
    kl_divergence,
    l1_loss,
    l2_loss,
    logit_laplace_loss,
    map_pixels,
    reconstruction_loss,
    temporal_difference_loss,
)
from models.normaliser import NormaliserMeter


def test_l1_is_a_mean():
    assert l1_loss(torch.full((1, 3, 2, 4, 4), 0.5), torch.zeros(1, 3, 2, 4, 4)).item() == pytest.approx(0.5)


def test_l2_is_a_mean_of_squares():
    assert l2_loss(torch.full((1, 3, 2, 4, 4), -0.5), torch.zeros(1, 3, 2, 4, 4)).item() == pytest.approx(0.25)


def test_temporal_difference_sees_flicker_and_not_a_constant_error():
    still = torch.zeros(1, 3, 3, 4, 4)
    assert temporal_difference_loss(still + 0.7, still).item() == 0.0
    flicker = still.clone()
    flicker[:, :, 1] = 0.5  # up by 0.5, and down again
    assert temporal_difference_loss(flicker, still).item() == pytest.approx(0.5)
    assert temporal_difference_loss(still[:, :, :1] + 0.7, still[:, :, :1]).item() == 0.0


class TestLogitLaplace:
    def test_is_the_likelihood_at_the_batchs_best_scale(self):
        generator = torch.Generator().manual_seed(0)
        reconstruction, target = torch.rand(2, 2, 3, 1, 4, 4, generator=generator) * 1.9 - 0.95
        mapped, location = map_pixels(target), torch.logit(map_pixels(reconstruction))

        def likelihood(scale):
            return TransformedDistribution(Laplace(location, scale), SigmoidTransform()).log_prob(mapped).mean().item()

        best = (torch.logit(mapped) - location).abs().mean().item()
        loss = logit_laplace_loss(reconstruction, target).item()
        assert loss == pytest.approx(-likelihood(best), rel=1e-5)
        assert loss < min(-likelihood(0.9 * best), -likelihood(1.1 * best))

    def test_pixels_are_mapped_to_where_logits_are_finite(self):
        assert map_pixels(torch.tensor([-1.0, 0.0, 1.0])).tolist() == pytest.approx([0.1, 0.5, 0.9])

    def test_a_decoder_that_gives_too_much_is_called_back(self):
        reconstruction = torch.full((1, 3, 1, 2, 2), 3.0, requires_grad=True)
        target = torch.ones(1, 3, 1, 2, 2)
        loss = logit_laplace_loss(reconstruction, target)
        loss.backward()
        assert (reconstruction.grad > 0).all()
        assert logit_laplace_loss(torch.full_like(target, 2.0), target) < loss

    def test_a_perfect_reconstruction_is_finite(self):
        target = torch.zeros(1, 3, 1, 2, 2)
        reconstruction = target.clone().requires_grad_()
        loss = logit_laplace_loss(reconstruction, target)
        loss.backward()
        assert loss.isfinite()
        assert reconstruction.grad.isfinite().all()


class TestReconstructionWeights:
    def test_the_loss_is_the_weighted_sum_of_the_terms_that_have_a_weight(self):
        generator = torch.Generator().manual_seed(0)
        reconstruction, target = torch.rand(2, 1, 3, 2, 8, 8, generator=generator)
        weights = ReconstructionWeights(l1=0.0, l2=2.0, haar=0.5, temporal=0.25, logit_laplace=0.125)
        loss, values = reconstruction_loss(reconstruction, target, weights)
        expected = {
            "l2": l2_loss(reconstruction, target).item(),
            "haar": haar_pyramid_loss(reconstruction, target).item(),
            "temporal": temporal_difference_loss(reconstruction, target).item(),
            "logit_laplace": logit_laplace_loss(reconstruction, target).item(),
        }
        assert {name: value.item() for name, value in values.items()} == expected
        assert loss.item() == pytest.approx(sum(getattr(weights, name) * value for name, value in expected.items()))

    def test_lpips_is_the_function_that_was_given(self):
        weights = ReconstructionWeights(l1=0.0, haar=0.0, lpips=2.0, lpips_weights=Path("vgg.safetensors"))
        pixels = torch.zeros(1, 3, 1, 8, 8)
        loss, values = reconstruction_loss(pixels, pixels, weights, lambda found, wanted: torch.tensor(3.0))
        assert (loss.item(), values["lpips"].item()) == (6.0, 3.0)
        with pytest.raises(ValueError, match="lpips has a weight"):
            reconstruction_loss(pixels, pixels, weights)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"temporal": -1.0}, "weight of temporal must not be negative"),
            ({"l2": float("nan")}, "weight of l2 must not be negative"),
            ({"l1": 0.0, "haar": 0.0}, "at least one term"),
            ({"lpips": 1.0}, "lpips and lpips_weights go together"),
            ({"lpips_weights": Path("vgg.safetensors")}, "lpips and lpips_weights go together"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ReconstructionWeights(**fields)


def test_haar_sees_detail_and_not_brightness():
    flat = torch.zeros(1, 1, 1, 8, 8)
    assert haar_pyramid_loss(flat + 0.7, flat).item() == pytest.approx(0.0)
    stripes = flat.clone()
    stripes[..., 1::2] = 1.0
    # Each 2x2 block has horizontal detail (0+0)-(1+1) = -2 and no other; coarser levels are flat. Mean over 3 bands
    # and 3 levels: 2 / 3 / 3.
    assert haar_pyramid_loss(stripes, flat).item() == pytest.approx(2 / 9)


def test_haar_stops_at_odd_sides():
    odd = torch.zeros(1, 3, 2, 6, 6)
    changed = odd.clone()
    changed[..., 0, 0] = 1.0
    assert haar_pyramid_loss(changed, odd, levels=3).item() == haar_pyramid_loss(changed, odd, levels=1).item() > 0


def test_kl_matches_torch_distributions_in_five_dimensions():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 2, 4, 3, 2, 5, generator=generator)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()),
        torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)),
    ).mean()
    assert kl_divergence(mean, logvar).item() == pytest.approx(expected.item(), rel=1e-5)


def test_shapes_that_would_broadcast_are_refused():
    losses = (
        l1_loss, l2_loss, haar_pyramid_loss, temporal_difference_loss, logit_laplace_loss, kl_divergence
    )  # fmt: skip
    for loss in losses:
        with pytest.raises(ValueError, match="equal shapes"):
            loss(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4))


def test_normaliser_equals_direct_computation_over_uneven_batches():
    generator = torch.Generator().manual_seed(0)
    offset = torch.tensor([1000.0, -3.0, 0.0]).view(1, 3, 1, 1, 1)
    batches = [torch.randn(b, 3, t, 2, 5, generator=generator) * 0.1 + offset for b, t in ((1, 1), (4, 3), (2, 7))]
    meter = NormaliserMeter()
    for batch in batches:
        meter.update(batch)
    values = torch.cat([batch.double().movedim(1, 0).flatten(1) for batch in batches], dim=1)
    normaliser = meter.result()
    assert normaliser.mean == pytest.approx(values.mean(dim=1).tolist(), abs=1e-12, rel=1e-12)
    assert normaliser.std == pytest.approx(values.std(dim=1, correction=0).tolist(), rel=1e-9)


def test_a_normaliser_of_nothing_or_of_infinities_is_refused():
    with pytest.raises(ValueError, match="got none"):
        NormaliserMeter().result()
    meter = NormaliserMeter()
    meter.update(torch.full((2, 3, 1, 4, 4), torch.inf))
    with pytest.raises(ValueError, match="finite latents"):
        meter.result()


def test_a_normaliser_names_the_channels_that_never_vary():
    latents = torch.zeros(1, 3, 1, 1, 2)
    latents[:, 0] = torch.tensor([-2.0, 2.0])
    latents[:, 2] = 5.0
    meter = NormaliserMeter()
    meter.update(latents)
    normaliser = meter.result()
    assert (normaliser.mean, normaliser.std) == ((0.0, 0.0, 5.0), (2.0, 1.0, 1.0))
    assert normaliser.formula.endswith("channels [1, 2] never varied: std 1")
