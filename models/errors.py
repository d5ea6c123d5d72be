"""The errors of models. All are ValueErrors: an input was wrong, and the message says what, where, and what to do.

GeometryError, for clips that are off an encoder's grid, is part of the contract in models.spec.
"""

from __future__ import annotations

INSTALL_DIFFUSERS = "pip install 'latentmill[diffusers]'"


class CheckpointError(ValueError):
    """A model's files are missing, damaged, or not what they should be. Names the file."""


class EncoderSourceError(ValueError):
    """A source names no encoder that can be loaded here."""


class EncoderProbeError(ValueError):
    """A loaded encoder does not do what its config promises; its latents would be wrong."""
