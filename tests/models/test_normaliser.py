"""One streaming pass gives what numpy gives of all values at once, however they are cut and whoever saw them."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.normaliser import NormaliserMeter

MEANS, STDS = (0.0, 1e4, -3e3, 5e-3, 1.0), (1.0, 1e-2, 2e-3, 1e-6, 300.0)


def hard_latents(batch: int) -> torch.Tensor:
    """float32 B 5 1 2 3; means of up to a million standard deviations, and a drift from clip to clip."""
    values = np.random.default_rng(0).standard_normal((batch, 5, 1, 2, 3)) + np.linspace(-1, 2, batch).reshape(
        -1, *[1] * 4
    )
    scale, shift = (np.reshape(column, (5, 1, 1, 1)) for column in (STDS, MEANS))
    return torch.from_numpy((values * scale + shift).astype(np.float32))


def measured(batches: Sequence[torch.Tensor]) -> NormaliserMeter:
    meter = NormaliserMeter()
    for batch in batches:
        meter.update(batch)
    return meter


def assert_exact(meter: NormaliserMeter, latents: torch.Tensor) -> None:
    values = latents.double().numpy()
    normaliser = meter.result()
    assert meter.count == values.size // 5
    np.testing.assert_allclose(normaliser.mean, values.mean(axis=(0, 2, 3, 4)), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(normaliser.std, values.std(axis=(0, 2, 3, 4)), rtol=1e-8)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
def test_batches_of_any_sizes_give_what_numpy_gives(sizes: list[int]) -> None:
    latents = hard_latents(sum(sizes))
    assert_exact(measured(latents.split(sizes)), latents)


@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=5).filter(any), st.randoms())
def test_ranks_are_merged_in_any_order(ranks: list[list[int]], random) -> None:
    latents = hard_latents(sum(map(sum, ranks)))
    shares = latents.split([sum(sizes) for sizes in ranks])
    meters = [measured(share.split(sizes) if sizes else ()) for share, sizes in zip(shares, ranks, strict=True)]
    random.shuffle(meters)
    merged = NormaliserMeter()
    for meter in meters:
        merged.merge(meter)
    assert_exact(merged, latents)


def test_the_reference_itself_is_exact_on_these() -> None:
    """In rational numbers, since numpy's mean of large values could be off, too."""
    latents = hard_latents(4)
    normaliser = measured(latents.split(1)).result()
    for channel in range(5):
        values = [Fraction(value) for value in latents[:, channel].flatten().tolist()]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        assert normaliser.mean[channel] == pytest.approx(float(mean), rel=1e-15, abs=1e-18)
        assert normaliser.std[channel] == pytest.approx(float(variance) ** 0.5, rel=1e-11)


def test_merging_leaves_the_other_meter_as_it_was() -> None:
    latents = hard_latents(6)
    other, empty = measured([latents[:2]]), NormaliserMeter()
    before = other.result()
    empty.merge(other)
    empty.update(latents[2:])
    assert_exact(empty, latents)
    assert other.result() == before
    assert other.count == 12


def test_a_meter_travels_as_one_tensor() -> None:
    latents = hard_latents(5)
    meter = measured(latents.split(2))
    state = meter.as_tensor()
    assert (state.shape, state.dtype) == ((3, 5), torch.float64)
    arrived = NormaliserMeter.from_tensor(state)
    assert arrived.result() == meter.result()
    arrived.update(latents)
    assert arrived.count == 60
    assert torch.equal(state, meter.as_tensor())


def test_meters_that_do_not_fit() -> None:
    meter = measured([hard_latents(1)])
    with pytest.raises(ValueError, match="5 channels was given 1"):
        meter.update(torch.zeros(1, 1, 1, 2, 3))
    with pytest.raises(ValueError, match="at least one batch"):
        NormaliserMeter().as_tensor()
