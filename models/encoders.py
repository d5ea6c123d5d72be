"""Find, describe and load an encoder: our checkpoints, and autoencoders saved by diffusers.

In:   a source: a local directory (a checkpoint of ours, a diffusers autoencoder, or a pipeline with a `vae` folder),
      or a Hugging Face hub id `owner/name`.
Out:  a directory, an EncoderCard, or a VideoEncoder in eval mode on its device.
Cost: describing reads the weights once to hash them and builds no module; loading also runs a tiny probe clip.
Errors: EncoderSourceError (nothing there, not supported, a package is missing), CheckpointError (damaged files),
      EncoderProbeError (the model does not do what its config promises). All are ValueErrors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from models.checkpoint import is_checkpoint
from models.errors import INSTALL_DIFFUSERS, CheckpointError, EncoderSourceError
from models.model_directory import CONFIG_FILE, WEIGHTS_FILE
from models.native import describe_native, load_native

if TYPE_CHECKING:
    from models.spec import EncoderCard, VideoEncoder

COMPUTE_DTYPES = ("float32", "bfloat16")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SUBFOLDER = "vae"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def resolve_source(source: str, subfolder: str | None = None) -> Path:
    """The local directory of an encoder, downloading its config and weights from the hub when it is not local.

    `subfolder` names the encoder's folder inside the source. By default a local directory is taken as it is when it
    has a config.json, else its `vae` folder; of a hub repository the `vae` folder is taken ("" for its root).

    Raises:
        EncoderSourceError: no such directory, no encoder in it, or the hub does not give it.
    """
    root = Path(source).expanduser()
    if root.is_dir():
        candidates = [root / subfolder] if subfolder is not None else [root, root / HUB_SUBFOLDER]
        for candidate in candidates:
            if (candidate / CONFIG_FILE).is_file():
                return candidate
        raise EncoderSourceError(f"{source}: no {CONFIG_FILE} in {' or '.join(str(path) for path in candidates)}")
    if not HUB_ID.fullmatch(source):
        raise EncoderSourceError(f"{source}: no such directory, and not a hub id of the form owner/name")
    return _download(source, HUB_SUBFOLDER if subfolder is None else subfolder)


def describe(source: str, subfolder: str | None = None) -> EncoderCard:
    """The card of an encoder, from its config and the hash of its weights, without building it.

    Raises:
        EncoderSourceError, CheckpointError: see the module.
    """
    directory = resolve_source(source, subfolder)
    if is_checkpoint(directory):
        return describe_native(directory)
    from models.pretrained.directory import describe_diffusers

    return describe_diffusers(directory, *_class_name(directory))


def load_encoder(
    source: str, *, device: str = "cpu", compute_dtype: str = "float32", subfolder: str | None = None
) -> VideoEncoder:
    """Load an encoder, ready on `device`: eval mode, no gradients, weights in `compute_dtype` (float32, bfloat16).

    Bits of a latent depend on device, thread count and batch size, which the caller fixes, and on `chunk_frames`; with
    a class that streams they do not depend on the clip's length (models.streamed). Others take clips whole
    (models.whole).

    Raises:
        EncoderSourceError, CheckpointError, EncoderProbeError: see the module.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise EncoderSourceError(f"compute_dtype {compute_dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}")
    directory = resolve_source(source, subfolder)
    import torch

    from models.streamed import ChunkedEncoder

    if is_checkpoint(directory):
        card, backend = load_native(directory)
        return ChunkedEncoder(card, backend, device, getattr(torch, compute_dtype))
    from models.pretrained.directory import load_diffusers

    return load_diffusers(directory, *_class_name(directory), device, getattr(torch, compute_dtype))


def _class_name(directory: Path) -> tuple[str, dict[str, object]]:
    """The `_class_name` of a diffusers config.json, and the whole config."""
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise EncoderSourceError(f'{path}: is neither a model of ours nor of diffusers: no "format", no "_class_name"')
    return config["_class_name"], config


def _download(repository: str, subfolder: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise EncoderSourceError(
            f"{repository}: is no local directory, and the hub needs: {INSTALL_DIFFUSERS}"
        ) from error
    prefix = f"{subfolder}/" if subfolder else ""
    files = [prefix + name for name in (CONFIG_FILE, WEIGHTS_FILE, DIFFUSERS_WEIGHTS_FILE)]
    try:
        snapshot = Path(snapshot_download(repository, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise EncoderSourceError(
            f"{repository}: no such directory here, and the hub did not give it: {error}"
        ) from error
    if not (snapshot / subfolder / CONFIG_FILE).is_file():
        raise EncoderSourceError(f"{repository}: has no {prefix}{CONFIG_FILE}; name the encoder's folder")
    return snapshot / subfolder
