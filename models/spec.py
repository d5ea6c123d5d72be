"""What the pipeline needs to know of an encoder: a protocol and three records.

In:   nothing; this module is names and arithmetic.
Out:  Geometry, Normaliser, EncoderCard, Posterior, VideoEncoder.
Cost: none; imports torch for the types only.
Errors: GeometryError when a clip's shape is not on the encoder's grid.

Shapes: B batch, T frames, H and W pixels, C latent channels, t h w the latent's own extents.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from models.chunks import StreamState
    from models.streamed import EncodeStream

PosteriorMode = Literal["mean", "moments", "sample"]
Causality = Literal["causal", "causal-attention", "none"]
_CHUNK_FRAMES_AT_LEAST = 8


class GeometryError(ValueError):
    """A clip's frames, height or width are not on the encoder's grid."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How pixels map to a latent.

    With `leading_frame`, frame counts are 1 + k * temporal_stride (an image is T = 1), else k * temporal_stride.
    `causality`: "causal" sees no future frame and streams in constant memory; "causal-attention" sees no future
    frame but attends to all of the past; "none" leaks from the future.
    """

    temporal_stride: int
    spatial_stride: int
    channels: int
    leading_frame: bool = True
    causality: Causality = "causal"

    def __post_init__(self) -> None:
        for name in ("temporal_stride", "spatial_stride", "channels"):
            if getattr(self, name) < 1:
                raise GeometryError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def frame_rule(self) -> str:
        """The frame counts that are on the grid, as people write it: "1+8k"."""
        return f"1+{self.temporal_stride}k" if self.leading_frame else f"{self.temporal_stride}k"

    @property
    def default_chunk_frames(self) -> int:
        """Frames of a streamed chunk after the leading one.

        The smallest multiple of the temporal stride that is at least 8: clips of 9, 17 or 33 frames need no filling.
        """
        return -(-_CHUNK_FRAMES_AT_LEAST // self.temporal_stride) * self.temporal_stride

    def frames_on_grid(self, num_frames: int) -> int:
        """The largest frame count on the grid that is at most num_frames; 0 when there is none."""
        lead = int(self.leading_frame)
        if num_frames < lead:
            return 0
        return lead + (num_frames - lead) // self.temporal_stride * self.temporal_stride

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip of T x H x W pixels.

        Raises:
            GeometryError: when the clip is off the grid; the message names the nearest sizes on it.
        """
        if num_frames < 1 or self.frames_on_grid(num_frames) != num_frames:
            below = self.frames_on_grid(num_frames)
            above = below + self.temporal_stride if below else int(self.leading_frame) or self.temporal_stride
            raise GeometryError(f"{num_frames} frames are not {self.frame_rule}: use {below or above} or {above}")
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % self.spatial_stride:
                below = value // self.spatial_stride * self.spatial_stride
                nearest = f"{below or self.spatial_stride} or {below + self.spatial_stride}"
                raise GeometryError(f"{name} {value} is not a multiple of {self.spatial_stride}: use {nearest}")
        latent_frames = (num_frames - int(self.leading_frame)) // self.temporal_stride + int(self.leading_frame)
        return self.channels, latent_frames, height // self.spatial_stride, width // self.spatial_stride


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """normalised = (latent - mean[c]) / std[c], per channel; the store keeps latents unnormalised.

    `formula` says where the numbers come from ("identity", "config mean/std", "scalar 0.18215", ...).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    formula: str = "(latent - mean) / std"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"a normaliser needs one mean and one std per channel, {len(self.mean)=} {len(self.std)=}")
        if any(not value > 0 for value in self.std):
            raise ValueError(f"a normaliser's std must be positive, got {self.std}")


@dataclasses.dataclass(frozen=True)
class EncoderCard:
    """Everything about an encoder that can be known, hashed and stored without running it.

    `fingerprint` is a sha256 over class, config and weights: two encoders with one fingerprint make one latent.
    `pixel_range` is what the encoder maps uint8 0..255 to before its first layer.
    """

    name: str
    kind: str
    geometry: Geometry
    normaliser: Normaliser
    fingerprint: str
    posterior: bool
    pixel_range: tuple[float, float] = (-1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Posterior:
    """What an encoder says of a batch of clips: float32 mean, B C t h w, and log-variance (same shape) or None."""

    mean: torch.Tensor
    logvar: torch.Tensor | None


class VideoEncoder(Protocol):
    """A frozen autoencoder, ready on its device. Threads may share it; a stream belongs to one of them at a time."""

    @property
    def card(self) -> EncoderCard:
        """Identity and geometry."""
        ...

    @property
    def one_at_a_time(self) -> bool:
        """Whether calls beside each other are no faster: they take turns, or share one GPU."""
        ...

    def encode(self, frames_BTHWC: torch.Tensor, chunk_frames: int | None = None) -> Posterior:
        """Encode uint8 RGB clips, B T H W 3, on any device; the result lies on the CPU in float32.

        `chunk_frames` streams the clip through the encoder that many frames at a time after the leading one
        (a multiple of the temporal stride); None takes the encoder's own default.

        Raises:
            GeometryError: the clip is not on the grid, or chunk_frames is given and the encoder cannot stream.
        """
        ...

    def encode_stream(self, chunk_frames: int | None = None, state: StreamState | None = None) -> EncodeStream:
        """A stream for one batch of clips whose frames come a few at a time, in memory that does not grow with T.

        What its `push` and `flush` give is, bit for bit, what `encode` gives for the whole clips. `state` is another
        such stream's, to go on from where it was left, be it in another process or after a `torch.load`.

        Raises:
            GeometryError: chunk_frames is not a multiple of the temporal stride or not the state's, or the encoder
                cannot stream.
        """
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Reconstruct from unnormalised latents, float B C t h w: uint8 RGB, B T H W 3, on the CPU."""
        ...
