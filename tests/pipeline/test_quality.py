import math

import numpy as np
import pytest
import torch

from pipeline.quality import flicker, psnr, ssim, temporal_psnr

RNG = np.random.default_rng(0)


def clip(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)


def noisy(frames: np.ndarray, amount: int) -> np.ndarray:
    noise = RNG.integers(-amount, amount + 1, frames.shape)
    return np.clip(frames.astype(int) + noise, 0, 255).astype(np.uint8)


def direct_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, window by window, with centred moments (Wang et al. 2004, equations 13 to 16)."""
    rows, columns = min(11, a.shape[1]), min(11, a.shape[2])
    y, x = np.mgrid[:rows, :columns]
    weights = np.exp(-((y - (rows - 1) / 2) ** 2 + (x - (columns - 1) / 2) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for t, c in np.ndindex(a.shape[0], 3):
        for i, j in np.ndindex(a.shape[1] - rows + 1, a.shape[2] - columns + 1):
            p = a[t, i : i + rows, j : j + columns, c].astype(float)
            q = b[t, i : i + rows, j : j + columns, c].astype(float)
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            variance_p, variance_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
            covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
            values.append(
                (2 * mean_p * mean_q + 6.5025)
                * (2 * covariance + 58.5225)
                / ((mean_p**2 + mean_q**2 + 6.5025) * (variance_p + variance_q + 58.5225))
            )
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(2, 16, 13), (1, 11, 11), (2, 5, 14), (1, 14, 4), (3, 1, 1)])
@pytest.mark.parametrize("amount", [3, 60])
def test_ssim_is_its_definition(shape, amount):
    a = clip(*shape)
    b = noisy(a, amount)
    assert ssim(a, b) == pytest.approx(direct_ssim(a, b), abs=1e-9)


def test_ssim_of_equal_clips_is_one_and_falls_with_noise():
    a = clip(2, 24, 24)
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)
    assert 1 > ssim(a, noisy(a, 5)) > ssim(a, noisy(a, 50)) > ssim(a, clip(2, 24, 24))


def test_ssim_of_flat_frames_is_the_luminance_term():
    a, b = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 120, np.uint8)
    assert ssim(a, b) == pytest.approx((2 * 100 * 120 + 6.5025) / (100**2 + 120**2 + 6.5025), abs=1e-9)


def test_psnr_of_a_known_error():
    a = np.full((3, 8, 8, 3), 50, np.uint8)
    assert psnr(a, a + np.uint8(1)) == pytest.approx(20 * math.log10(255))
    assert psnr(np.zeros_like(a), np.full_like(a, 255)) == pytest.approx(0.0)


def test_psnr_is_the_mean_over_frames_not_of_the_mean_error():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0] = 10
    b[1] = 100
    assert psnr(a, b) == pytest.approx(20 * (math.log10(25.5) + math.log10(2.55)) / 2)


def test_identical_frames_count_as_100_db():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1] = 255
    assert psnr(a, a) == 100
    assert psnr(a, b) == pytest.approx(50)


def test_no_frame_is_better_than_an_identical_one():
    a = np.zeros((1, 1080, 1920, 3), np.uint8)
    b = a.copy()
    b[0, 0, 0, 0] = 1
    assert psnr(a, b) == 100


def test_tensors_and_read_only_arrays_are_clips_too():
    a = clip(2, 12, 12)
    b = noisy(a, 9)
    a.flags.writeable = False
    tensor_a, tensor_b = torch.tensor(a.copy()), torch.tensor(b)
    assert psnr(a, b) == psnr(tensor_a, tensor_b)
    assert ssim(a, b) == ssim(tensor_a, tensor_b)


def flat(*levels: int) -> np.ndarray:
    """A clip whose frames are each of one level."""
    return np.stack([np.full((4, 5, 3), level, np.uint8) for level in levels])


def test_temporal_psnr_is_that_of_the_changes():
    a, b = clip(4, 9, 7), clip(4, 9, 7)
    changes_a, changes_b = np.diff(a.astype(float), axis=0), np.diff(b.astype(float), axis=0)
    errors = ((changes_a - changes_b) ** 2).mean(axis=(1, 2, 3))
    assert temporal_psnr(a, b) == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-9)


def test_temporal_psnr_forgives_an_error_that_stays():
    assert temporal_psnr(flat(10, 20, 30), flat(50, 60, 70)) == 100
    assert temporal_psnr(flat(10, 10), flat(10, 20)) == pytest.approx(20 * math.log10(25.5))


def test_flicker_is_by_how_much_more_the_reconstruction_changes():
    assert flicker(flat(100, 100, 100), flat(90, 110, 100)) == pytest.approx((20 + 10) / 2)
    assert flicker(flat(100, 110), flat(100, 84)) == pytest.approx(6)  # in the other direction, too
    source, made = clip(3, 6, 5), clip(3, 6, 5)
    moves = [np.abs(np.diff(frames.astype(float), axis=0)) for frames in (source, made)]
    assert flicker(source, made) == pytest.approx(np.maximum(moves[1] - moves[0], 0).mean(), abs=1e-9)


def test_a_still_reconstruction_does_not_flicker():
    source = clip(4, 6, 6)
    assert flicker(source, np.repeat(source[:1], 4, axis=0)) == 0
    assert flicker(source, source) == 0


def test_a_still_has_no_changes():
    assert temporal_psnr(clip(1, 4, 4), clip(1, 4, 4)) is None
    assert flicker(clip(1, 4, 4), clip(1, 4, 4)) is None


@pytest.mark.parametrize("metric", [psnr, ssim, temporal_psnr, flicker])
def test_what_is_no_pair_of_clips_is_refused(metric):
    a = clip(2, 4, 4)
    for other, message in [
        (clip(3, 4, 4), "differ in shape"),
        (a.astype(np.float32), "float32"),
        (a[0], "uint8 T H W 3"),
        (a[..., :2], "uint8 T H W 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric(a, other)
    with pytest.raises(ValueError, match="uint8 T H W 3"):
        metric(a[:0], a[:0])
