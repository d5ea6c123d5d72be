"""The Fréchet distance against closed forms, and statistics that do not depend on how vectors arrive."""

import math

import numpy as np
import pytest

from pipeline.frechet import FeatureStatistics, frechet_distance

RNG = np.random.default_rng(0)


def statistics(*batches: np.ndarray) -> FeatureStatistics:
    result = FeatureStatistics()
    for batch in batches:
        result.update(batch)
    return result


def with_moments(mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
    """Vectors that have exactly these moments: the columns of a root, and their opposites."""
    root = np.linalg.cholesky(covariance)
    width = len(mean)
    points = np.concatenate([root.T, -root.T]) * math.sqrt((2 * width - 1) / 2)
    return statistics(points + mean)


def test_moments_are_those_of_the_whole_set():
    features = RNG.normal(3, 2, (57, 6))
    found = statistics(features)
    np.testing.assert_allclose(found.mean, features.mean(axis=0))
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), atol=1e-12)


def test_any_batching_gives_the_same():
    features = RNG.normal(0, 1, (40, 5)).astype(np.float32) + 1000  # a large mean is where one pass would cancel
    whole, pieces = statistics(features), statistics(features[:1], features[1:3], features[3:30], features[30:])
    assert whole.count == pieces.count == 40
    np.testing.assert_allclose(pieces.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(pieces.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)


def test_one_dimension_is_means_and_deviations():
    a, b = with_moments(np.array([1.0]), np.array([[4.0]])), with_moments(np.array([4.0]), np.array([[25.0]]))
    assert frechet_distance(a, b) == pytest.approx(3**2 + (5 - 2) ** 2)


def test_diagonal_covariances_add_up():
    means, variances = (np.array([0.0, 1, 2]), np.array([3.0, 1, 2])), (np.array([1.0, 4, 9]), np.array([16.0, 4, 1]))
    a, b = (with_moments(mean, np.diag(variance)) for mean, variance in zip(means, variances, strict=True))
    expected = ((means[0] - means[1]) ** 2 + (np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_two_dimensions_that_do_not_commute():
    """tr M^(1/2) = (tr M + 2 det(M)^(1/2))^(1/2) for 2 x 2."""
    first, second = np.array([[2.0, 1.2], [1.2, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    product = first @ second
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    found = frechet_distance(with_moments(np.zeros(2), first), with_moments(np.ones(2), second))
    assert found == pytest.approx(2 + np.trace(first) + np.trace(second) - 2 * root)


def test_equal_sets_have_none_even_without_full_rank():
    few = statistics(RNG.normal(0, 1, (4, 30)))  # covariances of rank 3
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, statistics(RNG.normal(0, 1, (4, 30)))) > 1


def test_is_symmetric():
    a, b = statistics(RNG.normal(0, 1, (20, 4))), statistics(RNG.normal(1, 3, (30, 4)))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_what_cannot_be_compared():
    one = statistics(np.ones((1, 3)))
    with pytest.raises(ValueError, match="two vectors, got 1"):
        frechet_distance(one, one)
    with pytest.raises(ValueError, match="differ in width: 3 and 2"):
        frechet_distance(statistics(np.eye(3)), statistics(np.eye(2)))
    with pytest.raises(ValueError, match="one width"):
        one.update(np.ones((1, 4)))
    with pytest.raises(ValueError, match="N x D"):
        one.update(np.ones(3))
