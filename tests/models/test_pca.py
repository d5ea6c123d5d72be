"""PCA of patches against numpy's SVD, its error against the discarded variance, its sketch against the exact one."""

import numpy as np
import pytest
import torch

from models.generative.pca import PatchPcaMeter, psnr
from models.spec import Geometry, GeometryError

GEOMETRY = Geometry(temporal_stride=2, spatial_stride=4, channels=5)


def clips(count=6, frames=5, side=16, seed=0):
    """Smooth clips: sums of a few moving waves, so that few axes hold most of the variance."""
    generator = torch.Generator().manual_seed(seed)
    t, y, x = (torch.arange(size).view(shape) for size, shape in ((frames, (-1, 1, 1)), (side, (-1, 1)), (side, (-1,))))
    pixels = torch.zeros(count, 3, frames, side, side)
    for _ in range(6):
        a, b, c, phase = (torch.randn(count, 3, 1, 1, 1, generator=generator) for _ in range(4))
        pixels += torch.sin(0.4 * (a * t + b * y + c * x) + 3 * phase) / 6
    return pixels + 0.01 * torch.randn(pixels.shape, generator=generator)


def fitted(pixels, geometry=GEOMETRY, batch=2, **settings):
    meter = PatchPcaMeter(geometry, **settings)
    for part in pixels.split(batch):
        meter.update(part)
    return meter.result()


def rows_of(pixels, temporal, spatial):
    """Non-overlapping blocks as rows of numpy, written out."""
    array = pixels.double().numpy()
    return np.stack(
        [
            clip[:, k : k + temporal, y : y + spatial, x : x + spatial].ravel()
            for clip in array
            for k in range(0, array.shape[2], temporal)
            for y in range(0, array.shape[3], spatial)
            for x in range(0, array.shape[4], spatial)
        ]
    )


def test_equals_numpy_s_singular_vectors():
    pixels = clips()
    pca = fitted(pixels)
    for basis, part, temporal in ((pca.leading, pixels[:, :, :1], 1), (pca.groups, pixels[:, :, 1:], 2)):
        rows = rows_of(part, temporal, 4)
        _, singular, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        assert basis.mean.numpy() == pytest.approx(rows.mean(0), abs=1e-12)
        assert basis.variances.numpy() == pytest.approx(singular[:5] ** 2 / len(rows), rel=1e-9)
        assert np.abs(basis.directions.numpy() @ vectors[:5].T) == pytest.approx(np.eye(5), abs=1e-6)


def test_the_error_is_the_discarded_variance():
    pixels = clips()
    pca = fitted(pixels)
    error = (pca.decode(pca.encode(pixels).mean) - pixels).double().square()
    for basis, part in ((pca.leading, error[:, :, :1]), (pca.groups, error[:, :, 1:])):
        values = basis.mean.numel()
        discarded = basis.total_variance - basis.variances.sum().item()
        assert part.mean().item() * values == pytest.approx(discarded, rel=1e-4)
        assert 0 < discarded < 0.5 * basis.total_variance


def test_shapes_are_those_of_the_geometry():
    pca = fitted(clips())
    for frames in (1, 3, 9):
        pixels = clips(count=2, frames=frames, seed=1)
        posterior = pca.encode(pixels)
        assert posterior.mean.shape == (2, *GEOMETRY.latent_shape(frames, 16, 16))
        assert posterior.logvar is None
        assert pca.reconstruct(pixels).shape == pixels.shape


def test_one_batch_or_many_give_one_basis():
    pixels = clips()
    one, many = fitted(pixels, batch=6), fitted(pixels, batch=1)
    assert torch.allclose(one.groups.variances, many.groups.variances, rtol=1e-10)
    assert torch.allclose(one.groups.directions.abs(), many.groups.directions.abs(), atol=1e-7)


def test_a_sketch_is_nearly_as_good():
    pixels = clips(count=12, side=32)
    exact, sketch = fitted(pixels), fitted(pixels, max_exact_values=8)
    ours, best = ((pca.decode(pca.encode(pixels).mean) - pixels).square().mean().item() for pca in (sketch, exact))
    assert best <= ours < 1.02 * best
    assert torch.allclose(sketch.groups.directions @ sketch.groups.directions.T, torch.eye(5).double(), atol=1e-9)
    assert torch.allclose(sketch.groups.variances, exact.groups.variances, rtol=0.05)
    assert sketch.groups.total_variance == pytest.approx(exact.groups.total_variance)


def test_large_patches_need_no_covariance():
    """8 x 32 x 32 x 3 = 24576 values: what is kept is two sketches of 24576 x 32."""
    meter = PatchPcaMeter(Geometry(temporal_stride=8, spatial_stride=32, channels=8), max_exact_values=1024)
    pixels = clips(count=2, frames=9, side=64)
    meter.update(pixels)
    pca = meter.result()
    assert psnr(pca.reconstruct(pixels), pixels) > 30  # eight patches are eight axes but one
    assert pca.encode(pixels).mean.shape == (2, 8, 2, 2, 2)


def test_more_channels_than_values_lose_nothing():
    geometry = Geometry(temporal_stride=1, spatial_stride=2, channels=16)
    pixels = clips(count=2, frames=3)
    pca = fitted(pixels, geometry)
    latent = pca.encode(pixels).mean
    assert latent.shape == (2, 16, 3, 8, 8)
    assert not latent[:, 12:].any()
    assert torch.allclose(pca.decode(latent), pixels, atol=1e-5)


def test_constant_clips_have_no_variance_and_come_back():
    for settings in ({}, {"max_exact_values": 8}):
        pca = fitted(torch.full((2, 3, 5, 8, 8), 0.25), **settings)
        assert pca.groups.variances.sum().item() == pytest.approx(0.0, abs=1e-9)
        assert torch.allclose(pca.reconstruct(torch.full((1, 3, 5, 8, 8), 0.25)), torch.tensor(0.25))


def test_a_reconstruction_is_clamped_to_the_pixel_range():
    pca = fitted(clips())
    assert pca.reconstruct(20 * clips(seed=1)).abs().max() == 1.0


def test_images_alone_give_no_basis_for_frames():
    images = fitted(clips(frames=1))
    assert images.encode(clips(frames=1)).mean.shape == (6, 5, 1, 4, 4)
    with pytest.raises(ValueError, match="without the frames after it"):
        images.encode(clips())


def test_a_geometry_without_a_leading_frame():
    geometry = Geometry(temporal_stride=2, spatial_stride=4, channels=5, leading_frame=False, causality="none")
    pixels = clips(frames=4)
    pca = fitted(pixels, geometry)
    assert pca.leading is None
    assert pca.reconstruct(pixels).shape == pixels.shape


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="got none"):
        PatchPcaMeter(GEOMETRY).result()
    with pytest.raises(GeometryError, match=r"4 frames are not 1\+2k"):
        PatchPcaMeter(GEOMETRY).update(clips(frames=4))


def test_psnr():
    assert psnr(torch.zeros(8), torch.full((8,), 0.2)) == pytest.approx(20.0, abs=1e-5)
    assert psnr(torch.ones(2), torch.ones(2)) == float("inf")
