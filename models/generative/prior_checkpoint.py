"""A prior on disk: a directory of `config.json` and `model.safetensors`, bound to the autoencoder whose codes it knows.

In:   a CodePrior and its autoencoder's fingerprint; or such a directory and a fingerprint.
Out:  the directory, whole or not there at all; or the prior, after every byte was checked.
Cost: saving and loading read or write the weights once, hashing them as well.
Errors: CheckpointError names the file that is missing, damaged, of another kind, or of another autoencoder. Nothing is
        ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from models.errors import CheckpointError
from models.generative.prior import CodePrior
from models.generative.prior_config import PriorConfig
from models.weights import document_sha256, fingerprint, read_table

FORMAT = "latentmill.prior"
FORMAT_VERSION = 1
KIND = "CodePrior"


def save_prior(directory: Path, prior: CodePrior, autoencoder: str) -> str:
    """Write a new directory and return the prior's fingerprint. `autoencoder` is the fingerprint of its autoencoder.

    Raises:
        CheckpointError: the directory exists; checkpoints are never overwritten.
    """
    if directory.exists():
        raise CheckpointError(f"{directory}: exists already; save to a new directory or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    try:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in prior.state_dict().items()},
            partial / WEIGHTS_FILE,
        )
        identity = fingerprint(KIND, prior.config.as_json(), partial / WEIGHTS_FILE)
        _write_document(partial / CONFIG_FILE, prior.config, autoencoder, identity)
        for path in (partial / WEIGHTS_FILE, partial / CONFIG_FILE, partial):
            _flush_to_disk(path)
        partial.chmod(0o755)
        partial.rename(directory)
        _flush_to_disk(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return identity


def load_prior(directory: Path, autoencoder: str) -> CodePrior:
    """Load the prior of the autoencoder with that fingerprint, on the CPU, in eval mode, with no gradients.

    Raises:
        CheckpointError: a file is missing or damaged, or the prior belongs to another autoencoder.
    """
    document = _read_document(directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    if document["autoencoder"] != autoencoder:
        raise CheckpointError(
            f"{directory}: is a prior over the codes of the autoencoder {document['autoencoder'][:12]}, "
            f"not of {autoencoder[:12]}: train one with `latentmill train prior`"
        )
    try:
        config = PriorConfig.from_json(document["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: holds no valid prior: {error}") from error
    if fingerprint(KIND, config.as_json(), path) != document["fingerprint"]:
        raise CheckpointError(f"{path}: is not the file that {CONFIG_FILE} was saved with; its fingerprint differs")
    with torch.device("meta"):
        prior = CodePrior(config)
    wanted = {name: tuple(value.shape) for name, value in prior.state_dict().items()}
    if wanted != {name: entry.shape for name, entry in read_table(path).items()}:
        raise CheckpointError(f"{path}: its tensors do not fit the config beside it")
    prior.load_state_dict(load_file(path), assign=True)
    return prior.eval().requires_grad_(requires_grad=False)


def _write_document(path: Path, config: PriorConfig, autoencoder: str, identity: str) -> None:
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "config": config.as_json(),
        "autoencoder": autoencoder,
        "fingerprint": identity,
    }
    # Through JSON once, so that what is hashed is what will be read.
    document = json.loads(json.dumps(document))
    document["sha256"] = document_sha256(document)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f'{path}: is not a prior of ours: it lacks "format": "{FORMAT}"')
    if document.get("format_version") != FORMAT_VERSION or document.get("kind") != KIND:
        raise CheckpointError(
            f"{path}: is a {document.get('kind')!r} of format version {document.get('format_version')!r}; "
            f"this code reads a {KIND} of {FORMAT_VERSION}"
        )
    claimed = document.pop("sha256", None)
    if claimed != document_sha256(document):
        raise CheckpointError(f"{path}: does not match its own sha256; it was changed after it was saved")
    return document


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
