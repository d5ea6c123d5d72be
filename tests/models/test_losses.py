"""Losses against values worked out by hand, and the normaliser against a direct computation."""

import pytest
import torch

from models.losses import haar_pyramid_loss, kl_divergence, l1_loss
from models.normaliser import NormaliserMeter


def test_l1_is_a_mean():
    assert l1_loss(torch.full((1, 3, 2, 4, 4), 0.5), torch.zeros(1, 3, 2, 4, 4)).item() == pytest.approx(0.5)


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
    for loss in (l1_loss, haar_pyramid_loss, kl_divergence):
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


def test_a_normaliser_of_nothing_or_of_constants_is_refused():
    with pytest.raises(ValueError, match="got none"):
        NormaliserMeter().result()
    meter = NormaliserMeter()
    meter.update(torch.zeros(2, 3, 1, 4, 4))
    with pytest.raises(ValueError, match="vary in every channel"):
        meter.result()
