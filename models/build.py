"""From a model's record to its module.

In:   a ModelConfig.
Out:  a CausalAutoencoder; a TwoLevelAutoencoder where the config has a `top`.
Cost: its parameters, drawn at random: build under `torch.manual_seed` for repeatable weights, or on the meta device.
Errors: none; records check themselves.
"""

from __future__ import annotations

from models.autoencoder import CausalAutoencoder
from models.config import ModelConfig
from models.two_level import TwoLevelAutoencoder


def build_model(config: ModelConfig) -> CausalAutoencoder:
    """The autoencoder that a record describes. Both classes have one surface: streams, states, posteriors."""
    return CausalAutoencoder(config) if config.top is None else TwoLevelAutoencoder(config)
