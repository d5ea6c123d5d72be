"""Paths between latents: ends, lengths, angles, and the pairs that have no sphere between them."""

import math

import pytest
import torch

from models.generative.interpolation import interpolate


def latents(seed, batch=3):
    return torch.randn(batch, 4, 2, 3, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", ["line", "sphere"])
def test_the_ends_are_the_two_latents(path):
    first, second = latents(0), latents(1)
    steps = interpolate(first, second, 5, path)
    assert steps.shape == (5, 3, 4, 2, 3, 5)
    assert torch.equal(steps[0], first)
    assert torch.equal(steps[-1], second)


def test_a_line_is_evenly_spaced():
    first, second = latents(0), latents(1)
    steps = interpolate(first, second, 5, "line")
    for index in range(5):
        assert torch.allclose(steps[index], first + index / 4 * (second - first), atol=1e-6)


def test_a_sphere_is_evenly_spaced_in_angle_and_keeps_the_length():
    first = latents(0)
    second = latents(1) * (first.flatten(1).norm(dim=1) / latents(1).flatten(1).norm(dim=1)).view(3, 1, 1, 1, 1)
    steps = interpolate(first, second, 7, "sphere").flatten(2).double()
    norms = steps.norm(dim=2)
    assert torch.allclose(norms, norms[0].expand_as(norms), rtol=1e-5)
    cosines = (steps[1:] * steps[:-1]).sum(2) / (norms[1:] * norms[:-1])
    assert torch.allclose(cosines, cosines[0].expand_as(cosines), atol=1e-6)
    whole = (steps[0] * steps[-1]).sum(1) / (norms[0] * norms[-1])
    assert torch.allclose(torch.acos(cosines[0]) * 6, torch.acos(whole), atol=1e-3)
    line = interpolate(first, second, 7, "line").flatten(2).norm(dim=2)
    assert (line[3] < 0.8 * line[0]).all()


def test_a_quarter_circle():
    first, second = (torch.tensor(xy).view(1, 2, 1, 1, 1) for xy in ([2.0, 0.0], [0.0, 2.0]))
    middle = interpolate(first, second, 3)[1].flatten()
    assert middle.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2)])


def test_latents_in_one_direction_or_opposite_ones_go_along_the_line():
    first = latents(0)
    others = torch.stack([first[0], 3 * first[1], -first[2]])
    sphere, line = (interpolate(first, others, 5, path) for path in ("sphere", "line"))
    assert torch.allclose(sphere, line, atol=1e-6)
    assert sphere.isfinite().all()


def test_each_latent_of_a_batch_has_its_own_angle():
    first, second = latents(0), latents(1)
    second[0] = first[0]
    steps = interpolate(first, second, 5)
    for index in range(3):
        alone = interpolate(first[index : index + 1], second[index : index + 1], 5)
        assert torch.equal(steps[:, index], alone[:, 0])


def test_what_cannot_be_interpolated_is_refused():
    with pytest.raises(ValueError, match="of one shape"):
        interpolate(latents(0), latents(1, batch=1), 3)
    with pytest.raises(ValueError, match="num_steps must be at least 2"):
        interpolate(latents(0), latents(1), 1)
