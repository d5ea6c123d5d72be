"""From a bottleneck's record to its module.

In:   a BottleneckConfig and the latent's channels.
Out:  a Bottleneck.
Cost: its parameters.
Errors: none; records check themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.bottlenecks.config import BottleneckConfig, Fsq, Gumbel, Kl, Lfq, NoBottleneck, ResidualVq, Vq
from models.bottlenecks.continuous import KlBottleneck, PlainBottleneck
from models.bottlenecks.fsq import FsqBottleneck
from models.bottlenecks.gumbel import GumbelBottleneck
from models.bottlenecks.interface import Bottleneck
from models.bottlenecks.lfq import LfqBottleneck
from models.bottlenecks.residual_vq import ResidualVqBottleneck
from models.bottlenecks.vq import VqBottleneck

BOTTLENECKS: dict[type[BottleneckConfig], Callable[[Any, int], Bottleneck]] = {
    NoBottleneck: PlainBottleneck,
    Kl: KlBottleneck,
    Fsq: FsqBottleneck,
    Vq: VqBottleneck,
    ResidualVq: ResidualVqBottleneck,
    Lfq: LfqBottleneck,
    Gumbel: GumbelBottleneck,
}


def build_bottleneck(config: BottleneckConfig, latent_channels: int) -> Bottleneck:
    """The module that a record describes."""
    return BOTTLENECKS[type(config)](config, latent_channels)
