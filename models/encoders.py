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
    from collections.abc import Sequence

    from models.spec import EncoderCard, VideoEncoder

COMPUTE_DTYPES = ("float32", "bfloat16")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SUBFOLDER = "vae"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def resolve_source(source: str, subfolder: str | None = None) -> Path:
    """The local directory of an encoder, downloading its config and weights from the hub when it is not local.

    `subfolder` names the encoder's folder inside the source ("" for its root). By default a local directory is taken as
    it is when it has a config.json, else its `vae` folder; a hub repository by its `vae` folder, else by its root.

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
    return _download(source, (HUB_SUBFOLDER, "") if subfolder is None else (subfolder,))


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


def _download(repository: str, subfolders: Sequence[str]) -> Path:
    """The first of these folders of a hub repository that holds a config.json, with the weights beside it."""
    for subfolder in subfolders:
        if not subfolder and not _is_encoder(_fetch(repository, "", [CONFIG_FILE])):
            continue
        directory = _fetch(repository, subfolder, [CONFIG_FILE, WEIGHTS_FILE, DIFFUSERS_WEIGHTS_FILE])
        if (directory / CONFIG_FILE).is_file():
            return directory
    missing = " and no ".join(_path_in(subfolder, CONFIG_FILE) for subfolder in subfolders)
    raise EncoderSourceError(
        f"{repository}: has no {missing}: download the folder in which its encoder lies, and name that directory"
    )


def _is_encoder(root: Path) -> bool:
    """Asked before the weights come: a repository's root may hold any model, of many gigabytes.

    Raises:
        EncoderSourceError: it does.
    """
    if not (root / CONFIG_FILE).is_file():
        return False
    if not is_checkpoint(root):
        from models.pretrained.directory import find_rule

        find_rule(root, _class_name(root)[0])
    return True


def _path_in(subfolder: str, name: str) -> str:
    return f"{subfolder}/{name}" if subfolder else name


def _fetch(repository: str, subfolder: str, names: Sequence[str]) -> Path:
    """A folder of a hub repository's snapshot, with those of the files that the repository has."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise EncoderSourceError(
            f"{repository}: is no local directory, and the hub needs: {INSTALL_DIFFUSERS}"
        ) from error
    files = [_path_in(subfolder, name) for name in names]
    try:
        return Path(snapshot_download(repository, allow_patterns=files)) / subfolder
    except (OSError, ValueError) as error:
        raise EncoderSourceError(
            f"{repository}: no such directory here, and the hub did not give it: {error}"
        ) from error
