"""Backbones that are narrow enough to train in a test."""

from models.config import BackboneConfig, Pyramid

NARROW = BackboneConfig(
    patch_size=2,
    downs=((2, 2),),
    encoder=Pyramid((8, 16), depth=1),
    decoder=Pyramid((8, 16), depth=1),
    latent_channels=4,
)
