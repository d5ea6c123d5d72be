"""The ways to keep a clip that an evaluation compares: an encoder, and baselines that spend as much per clip.

In:   an encoder's source; clips to fit to; uint8 frames T H W 3.
Out:  reconstructions of one shape with the frames, a Rate per bucket, and what is known of an encoder's latents.
Cost: one encode and one decode per clip; fitting is as of models.generative.pca.
Errors: UsageError for an encoder that cannot be loaded, and for clips that nothing can be fitted to; SampleError for a
        latent that cannot be stored.

An equal rate means: of a continuous latent, as many numbers per latent position; of codes, as many numbers as hold
their bits, rounded up, so that a baseline never has less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from jobs.prepare import open_encoder
from jobs.rehearsal import is_rehearsal
from models.autoencoder import CausalAutoencoder
from models.checkpoint import is_checkpoint
from models.encoders import resolve_source
from models.generative.codes import code_extents, codebook_sizes, latent_to_grids
from models.generative.pca import PatchPca, PatchPcaMeter
from models.native import load_native
from models.pixels import to_frames, to_pixels
from models.spec import Posterior, VideoEncoder
from models.streamed import ChunkedEncoder
from pipeline.buckets import Bucket
from pipeline.errors import SampleError, UsageError
from pipeline.evaluation import CodeCounts, Rate, bicubic, bicubic_size
from pipeline.recipe import StoreDtype
from pipeline.store import to_float32, to_stored


class Codec(Protocol):
    """A way to keep a clip."""

    name: str

    def rate(self, bucket: Bucket) -> Rate:
        """What a clip costs."""
        ...

    def reconstruct(self, frames: np.ndarray) -> np.ndarray:
        """What is left of a clip, uint8 T H W 3."""
        ...


def bits_per_number(dtype: StoreDtype) -> int:
    """Bits of one stored value."""
    return 8 * to_stored(np.zeros(1, np.float32), dtype).itemsize


def as_stored(values: Tensor, dtype: StoreDtype) -> Tensor:
    """Values as a store gives them back.

    Raises:
        SampleError: some are not finite, or too large for the type; with the reasons that `encode` records.
    """
    if not bool(values.isfinite().all()):
        raise SampleError("not_finite", "the encoder made infinite or NaN values")
    stored = torch.from_numpy(to_float32(to_stored(values.numpy(), dtype), dtype))
    if not bool(stored.isfinite().all()):
        raise SampleError("overflow", f"|latent| reaches {values.abs().max():.6g}, too large for {dtype}")
    return stored


class EncoderCodec:
    """An encoder as a store uses it: the posterior's mean, rounded to the stored type, decoded.

    `model` is the module of a model of ours, whose codes are known. `counts`, one per codebook, grow with every clip.
    """

    def __init__(self, encoder: VideoEncoder, model: CausalAutoencoder | None, dtype: StoreDtype) -> None:
        self.encoder, self.dtype = encoder, dtype
        self.name = encoder.card.name
        self.model = model if model is not None and model.bottleneck.codebook_sizes else None
        levels = codebook_sizes(self.model) if self.model else ()
        self.counts = [[CodeCounts(size) for size in sizes] for sizes in levels]

    def rate(self, bucket: Bucket) -> Rate:
        shape = bucket.num_frames, bucket.height, bucket.width
        if self.model is None:
            numbers = math.prod(self.encoder.card.geometry.latent_shape(*shape))
            return Rate(numbers, numbers * bits_per_number(self.dtype), math.prod(shape))
        ids, bits = _code_cost(self.model, *shape)
        return Rate(ids, bits, math.prod(shape))

    @property
    def numbers_per_position(self) -> int:
        """Numbers per latent position that a baseline may spend."""
        geometry = self.encoder.card.geometry
        if self.model is None:
            return geometry.channels
        side, lead = geometry.spatial_stride, int(geometry.leading_frame)
        _, leading_bits = _code_cost(self.model, lead, side, side) if lead else (0, 0.0)
        _, bits = _code_cost(self.model, lead + geometry.temporal_stride, side, side)
        return math.ceil((bits - leading_bits) / bits_per_number(self.dtype))

    def encode(self, frames: np.ndarray) -> Posterior:
        """The posterior of one clip, with the mean as it is stored.

        Raises:
            SampleError: it cannot be stored.
        """
        posterior = self.encoder.encode(torch.from_numpy(frames)[None])
        return Posterior(as_stored(posterior.mean, self.dtype), posterior.logvar)

    def decode(self, latent: Tensor) -> np.ndarray:
        """The frames of one clip's latent, 1 C t h w."""
        return self.encoder.decode(latent)[0].numpy()

    def reconstruct(self, frames: np.ndarray) -> np.ndarray:
        return self.decode(self.encode(frames).mean)

    def count_codes(self, latent: Tensor) -> None:
        """Take in the codes of one clip's latent; of a continuous one there are none."""
        if self.model is None:
            return
        with torch.inference_mode():
            grids = latent_to_grids(self.model, latent.to(next(self.model.parameters()).device))
        for counts, grid in zip(self.counts, grids, strict=True):
            for number, codebook in enumerate(counts):
                codebook.update(grid[:, number])


def _code_cost(model: CausalAutoencoder, num_frames: int, height: int, width: int) -> tuple[int, float]:
    """Ids of a clip and their bits, all codes of a codebook being as long."""
    extents = code_extents(model.config, num_frames, height, width)
    levels = list(zip(map(math.prod, extents), codebook_sizes(model), strict=True))
    ids = sum(positions * len(sizes) for positions, sizes in levels)
    return ids, sum(positions * sum(map(math.log2, sizes)) for positions, sizes in levels)


def open_codec(source: str, dtype: StoreDtype, device: str, compute_dtype: str) -> EncoderCodec:
    """Any encoder that `encode` takes; of one of our models the module as well.

    Raises:
        UsageError: it cannot be loaded.
    """
    try:
        if not is_rehearsal(source) and is_checkpoint(directory := resolve_source(source)):
            card, backend = load_native(directory)
            encoder = ChunkedEncoder(card, backend, device, getattr(torch, compute_dtype))
            return EncoderCodec(encoder, backend.model, dtype)
    except ValueError as error:
        raise UsageError(f"the encoder {source} cannot be loaded: {error}") from error
    return EncoderCodec(open_encoder(source, device, compute_dtype), None, dtype)


class PcaCodec:
    """PCA of patches at the encoder's strides: the best that a linear autoencoder could do."""

    name = "PCA"

    def __init__(self, pca: PatchPca, dtype: StoreDtype) -> None:
        self.pca, self.dtype = pca, dtype

    @classmethod
    def fit(cls, codec: EncoderCodec, clips: Iterable[np.ndarray]) -> PcaCodec:
        """Fitted to clips uint8 T H W 3."""
        geometry = dataclasses.replace(codec.encoder.card.geometry, channels=codec.numbers_per_position)
        meter = PatchPcaMeter(geometry)
        for frames in clips:
            meter.update(_pixels(frames))
        return cls(meter.result(), codec.dtype)

    def rate(self, bucket: Bucket) -> Rate:
        numbers = math.prod(self.pca.geometry.latent_shape(bucket.num_frames, bucket.height, bucket.width))
        return Rate(numbers, numbers * bits_per_number(self.dtype), bucket.num_frames * bucket.height * bucket.width)

    def reconstruct(self, frames: np.ndarray) -> np.ndarray:
        try:
            latent = as_stored(self.pca.encode(_pixels(frames)).mean, self.dtype)
        except ValueError as error:
            raise UsageError(f"--baseline-shards: {error}") from error
        return to_frames(self.pca.decode(latent))[0].numpy()


class BicubicCodec:
    """Every frame made small, and large again."""

    name = "bicubic"

    def __init__(self, codec: EncoderCodec) -> None:
        self.geometry, self.dtype = codec.encoder.card.geometry, codec.dtype
        self.numbers_per_position = codec.numbers_per_position

    def size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that is kept of every frame."""
        _, *positions = self.geometry.latent_shape(num_frames, height, width)
        return bicubic_size(height, width, self.numbers_per_position * math.prod(positions) / num_frames)

    def rate(self, bucket: Bucket) -> Rate:
        shape = bucket.num_frames, bucket.height, bucket.width
        numbers = 3 * bucket.num_frames * math.prod(self.size(*shape))
        return Rate(numbers, numbers * bits_per_number(self.dtype), math.prod(shape))

    def reconstruct(self, frames: np.ndarray) -> np.ndarray:
        num_frames, height, width, _ = frames.shape
        return bicubic(frames, self.size(num_frames, height, width))


def _pixels(frames: np.ndarray) -> Tensor:
    return to_pixels(torch.from_numpy(frames)[None], "cpu")
