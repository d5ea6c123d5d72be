"""PCA of patches: the best linear autoencoder at an encoder's own geometry, as a baseline at the same rate.

In:   a Geometry; training clips, float B 3 T H W in [-1, 1], batch by batch.
Out:  PatchPca, with the `encode` and `decode` of our autoencoders: C numbers per patch of one temporal x spatial x
      spatial stride. The leading frame has patches of one frame, and a basis of its own.
Cost: fitting: float64 sums of D x D numbers for patches of D values, up to MAX_EXACT_VALUES; beyond, two sketches of
      D x (2 C + 16). Neither grows with the data; the eigenvectors of D = 3072 take many seconds. Encoding: one matrix
      product, C D multiply-adds per patch.
Errors: GeometryError for clips off the grid; ValueError where nothing was seen to fit a basis to.

Up to MAX_EXACT_VALUES the result is exact. Larger patches (8 x 32 x 32 x 3 has 24576 values, a covariance of 4.8 GB)
are fitted by a Nystrom sketch: the covariance meets fixed random directions only, batch by batch, and its top
eigenvectors are recovered from that. The subspace found is nearly the best when variances fall off, as those of pixels
do.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from models.causal import depth_to_space, space_to_depth
from models.spec import Geometry, Posterior

MAX_EXACT_VALUES = 4096
ROWS_PER_SLICE = 4096
OVERSAMPLING = 16


@dataclasses.dataclass(frozen=True)
class PatchBasis:
    """The axes of greatest variance of patches of D values, float64.

    mean: D. directions: C x D, orthonormal rows; rows beyond D are zero. variances: C, along them, falling.
    total_variance: along all axes, so that a patch loses total_variance - sum(variances) on average, squared.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    total_variance: float

    def project(self, patches: Tensor) -> Tensor:
        """Patches B D t h w to B C t h w."""
        centred = patches - self.mean.to(patches).view(1, -1, 1, 1, 1)
        return torch.einsum("cd,bdthw->bcthw", self.directions.to(patches), centred)

    def restore(self, latent: Tensor) -> Tensor:
        """B C t h w to the nearest patches in the subspace, B D t h w."""
        patches = torch.einsum("cd,bcthw->bdthw", self.directions.to(latent), latent)
        return patches + self.mean.to(latent).view(1, -1, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class PatchPca:
    """A fitted PCA. A basis is None where the training clips had no such patches (images alone, say)."""

    geometry: Geometry
    leading: PatchBasis | None
    groups: PatchBasis | None

    def encode(self, pixels: Tensor) -> Posterior:
        """Clips B 3 T H W to latents B C t h w."""
        self.geometry.latent_shape(*pixels.shape[2:])
        bases = (self.leading, self.groups)
        parts = zip(_patches(pixels, self.geometry), bases, ("leading frame", "frames after it"), strict=True)
        latents = [_require(basis, which).project(patches) for patches, basis, which in parts if patches.shape[2]]
        return Posterior(torch.cat(latents, dim=2).float(), None)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents B C t h w to pixels B 3 T H W, not clamped."""
        lead, spatial = int(self.geometry.leading_frame), self.geometry.spatial_stride
        parts = [
            (latent[:, :, :lead], self.leading, 1, "leading frame"),
            (latent[:, :, lead:], self.groups, self.geometry.temporal_stride, "frames after it"),
        ]
        pixels = [
            depth_to_space(_require(basis, which).restore(part), temporal, spatial)
            for part, basis, temporal, which in parts
            if part.shape[2]
        ]
        return torch.cat(pixels, dim=2)

    def reconstruct(self, pixels: Tensor) -> Tensor:
        """What is left of clips B 3 T H W after C numbers per patch; clamped to [-1, 1]."""
        return self.decode(self.encode(pixels).mean).clamp(-1, 1)


class PatchPcaMeter:
    """Collects clips, batch by batch, and says their PCA. Equal clips in any batching give it up to rounding."""

    def __init__(self, geometry: Geometry, max_exact_values: int = MAX_EXACT_VALUES) -> None:
        self.geometry = geometry
        values = 3 * geometry.spatial_stride**2
        self._covariances = [
            _Covariance(values * frames, geometry.channels, max_exact_values)
            for frames in (1, geometry.temporal_stride)
        ]

    def update(self, pixels: Tensor) -> None:
        """Take in clips B 3 T H W."""
        self.geometry.latent_shape(*pixels.shape[2:])
        for patches, covariance in zip(_patches(pixels, self.geometry), self._covariances, strict=True):
            rows = patches.movedim(1, -1).flatten(0, -2)
            for start in range(0, len(rows), ROWS_PER_SLICE):
                covariance.update(rows[start : start + ROWS_PER_SLICE].double())

    def result(self) -> PatchPca:
        """The PCA of all clips so far.

        Raises:
            ValueError: there were none.
        """
        leading, groups = (covariance.basis() if covariance.count else None for covariance in self._covariances)
        if leading is None and groups is None:
            raise ValueError("a PCA is fitted to clips, got none")
        return PatchPca(self.geometry, leading, groups)


class _Covariance:
    """Sums of rows N x D, enough for the covariance (D <= max_exact_values) or for its action on fixed directions."""

    def __init__(self, values: int, channels: int, max_exact_values: int) -> None:
        self.values, self.channels, self.rank = values, channels, min(channels, values)
        self.count, self.square_sum = 0, 0.0
        self.sum = torch.zeros(values, dtype=torch.float64)
        self.probes = None if values <= max_exact_values else self._random_directions()
        columns = values if self.probes is None else self.probes.shape[1]
        self.product = torch.zeros(values, columns, dtype=torch.float64)

    def _random_directions(self) -> Tensor:
        width = min(2 * self.rank + OVERSAMPLING, self.values)
        generator = torch.Generator().manual_seed(0)
        gaussian = torch.randn(self.values, width, dtype=torch.float64, generator=generator)
        directions: Tensor = torch.linalg.qr(gaussian)[0]
        return directions

    def update(self, rows: Tensor) -> None:
        rows = rows.cpu()
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.square_sum += rows.square().sum().item()
        self.product += rows.T @ (rows if self.probes is None else rows @ self.probes)

    def basis(self) -> PatchBasis:
        mean = self.sum / self.count
        mean_along = mean if self.probes is None else mean @ self.probes
        product = self.product / self.count - torch.outer(mean, mean_along)
        variances, directions = _eigenvectors(product) if self.probes is None else _nystrom(product, self.probes)
        missing = self.channels - self.rank
        return PatchBasis(
            mean,
            torch.nn.functional.pad(directions[:, : self.rank].T, (0, 0, 0, missing)),
            torch.nn.functional.pad(variances[: self.rank], (0, missing)),
            self.square_sum / self.count - mean.square().sum().item(),
        )


def psnr(reconstruction: Tensor, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]; of equal ones, infinite."""
    mean_square = (reconstruction - pixels).double().square().mean().item()
    return 10 * math.log10(4 / mean_square) if mean_square else math.inf


def _patches(pixels: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The leading frame's patches and those of the frame groups after it, B D t h w each; t may be 0."""
    lead = int(geometry.leading_frame)
    return (
        space_to_depth(pixels[:, :, :lead], 1, geometry.spatial_stride),
        space_to_depth(pixels[:, :, lead:], geometry.temporal_stride, geometry.spatial_stride),
    )


def _eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _nystrom(product: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the Nystrom approximation P (Q' P)^-1 P' of a covariance A, from P = A Q with orthonormal Q.

    With the shift that keeps the Cholesky factor stable. Tropp et al., arXiv:1706.05736, algorithm 3.
    """
    shift = torch.finfo(product.dtype).eps * math.sqrt(len(product)) * max(product.norm().item(), 1.0)
    product = product + shift * probes
    core = probes.T @ product
    factor = torch.linalg.cholesky((core + core.T) / 2)
    half = torch.linalg.solve_triangular(factor, product.T, upper=False).T
    vectors, singular_values, _ = torch.linalg.svd(half, full_matrices=False)
    return (singular_values.square() - shift).clamp(min=0), vectors


def _require(basis: PatchBasis | None, which: str) -> PatchBasis:
    if basis is None:
        raise ValueError(f"this PCA was fitted to clips without the {which}: fit it to clips like those to encode")
    return basis
