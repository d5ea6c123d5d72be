"""How to train an autoencoder, as a frozen record.

In:   fields.
Out:  TrainSettings.
Cost: none; no torch.
Errors: ValueError names the field that cannot be, with its value.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train. The defaults bring the tiny presets to a recognisable picture in a minute of two CPU threads."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    final_learning_rate_ratio: float = 0.05
    """Where the cosine ends, as a share of the peak."""
    warmup_steps: int = 20
    """Steps of linear growth before the cosine."""
    weight_decay: float = 0.01
    """Of AdamW."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.98
    """Of the averaged weights, an upper bound: early on the average is as short as (1 + step) / (10 + step)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and convolutions; norms, bottlenecks and losses stay in float32."""
    micro_batches: int = 1
    """Equal parts that a batch is passed in, one after the other, their gradients summed up."""
    freeze_encoder: bool = False
    """Learn the decoder alone; latents that were stored before stay valid."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm", "micro_batches"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("ema_decay", "final_learning_rate_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision {self.precision!r} is not one of float32, bfloat16")
