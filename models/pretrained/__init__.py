"""Pretrained autoencoders, saved by diffusers, behind models.spec.VideoEncoder.

Importing this package imports neither torch nor diffusers. By module:

    directory       describe and load a saved autoencoder: the table of classes, and the probe
    rules           what is written down of one class: geometry, normaliser, how it runs
    released        the released full-size configs, to build with random weights
    wan, ltx, vidtok, magvit, images        families that stream
    hunyuan, cogvideox, cosmos, mochi       families that take a clip whole
    lent_state      a stream's state for layers that would keep it on themselves
    whole_backend   what the families that take a clip whole share
"""

from models.pretrained.released import real_configs

__all__ = ["real_configs"]
