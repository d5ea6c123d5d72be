"""Our checkpoints on disk: a directory of `config.json` and `model.safetensors`, whole or not there at all.

In:   a CausalAutoencoder and its Normaliser; or such a directory.
Out:  the directory; or both again, bit for bit, after every byte was checked.
Cost: saving and loading read or write the weights once, hashing them as well.
Errors: CheckpointError names the file that is missing, damaged or of another kind. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import ModelConfig
from models.errors import CheckpointError
from models.spec import Normaliser
from models.weights import document_sha256, fingerprint, read_table

if TYPE_CHECKING:
    from models.autoencoder import CausalAutoencoder

FORMAT = "latentmill.model"
FORMAT_VERSION = 2
KIND = "CausalAutoencoder"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class ModelDocument:
    """What `config.json` says. `fingerprint` is of kind, config and weights, as in models.weights."""

    config: ModelConfig
    normaliser: Normaliser
    fingerprint: str


def save_checkpoint(directory: Path, model: CausalAutoencoder, normaliser: Normaliser) -> str:
    """Write a new checkpoint directory and return the model's fingerprint.

    The directory appears under its name complete or not at all.

    Raises:
        CheckpointError: the directory exists; checkpoints are never overwritten.
    """
    from safetensors.torch import save_file

    if directory.exists():
        raise CheckpointError(f"{directory}: exists already; save to a new directory or remove it")
    channels = model.config.geometry.channels
    if len(normaliser.mean) != channels:
        raise CheckpointError(f"{directory}: the normaliser has {len(normaliser.mean)} channels, the model {channels}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    try:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, partial / WEIGHTS_FILE)
        identity = fingerprint(KIND, model.config.as_json(), partial / WEIGHTS_FILE)
        document = _as_document(ModelDocument(model.config, normaliser, identity))
        (partial / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        for path in (partial / WEIGHTS_FILE, partial / CONFIG_FILE, partial):
            _flush_to_disk(path)
        partial.chmod(0o755)
        partial.rename(directory)
        _flush_to_disk(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return identity


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory claims to be one of ours: its config.json says so."""
    try:
        document = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT


def read_document(directory: Path) -> ModelDocument:
    """Read and check `config.json`, without the weights."""
    path = directory / CONFIG_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f'{path}: is not a model of ours: it lacks "format": "{FORMAT}"')
    if document.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {document.get('format_version')!r}; this code reads {FORMAT_VERSION}"
        )
    claimed = document.pop("sha256", None)
    if claimed != document_sha256(document):
        raise CheckpointError(f"{path}: does not match its own sha256; it was changed after it was saved")
    if document.get("kind") != KIND:
        raise CheckpointError(f"{path}: holds a model of kind {document.get('kind')!r}; this code builds {KIND}")
    try:
        return ModelDocument(
            ModelConfig.from_json(document["config"]), _normaliser(document["normaliser"]), document["fingerprint"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no valid model: {error}") from error


def check_weights(directory: Path, document: ModelDocument) -> None:
    """Hash the weights and compare with what `config.json` says.

    Raises:
        CheckpointError: any byte, name, dtype or shape differs.
    """
    path = directory / WEIGHTS_FILE
    if fingerprint(KIND, document.config.as_json(), path) != document.fingerprint:
        raise CheckpointError(f"{path}: is not the file that {CONFIG_FILE} was saved with; its fingerprint differs")


def load_checkpoint(directory: Path) -> tuple[CausalAutoencoder, ModelDocument]:
    """Load a checkpoint on the CPU, in eval mode, with no gradients, after checking every byte.

    Raises:
        CheckpointError: a file is missing, damaged or not of this model.
    """
    import torch
    from safetensors.torch import load_file

    from models.build import build_model

    document = read_document(directory)
    check_weights(directory, document)
    with torch.device("meta"):  # no random weights are drawn that would be thrown away
        model = build_model(document.config)
    path = directory / WEIGHTS_FILE
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: entry.shape for name, entry in read_table(path).items()}
    if wanted != found:
        names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(f"{path}: does not fit its config at {', '.join(names[:4])} ({len(names)} in all)")
    model.load_state_dict(load_file(path), assign=True)
    model.lay_out()
    return model.eval().requires_grad_(requires_grad=False), document


def _as_document(model: ModelDocument) -> dict[str, Any]:
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "config": model.config.as_json(),
        "normaliser": dataclasses.asdict(model.normaliser),
        "fingerprint": model.fingerprint,
    }
    # Through JSON once, so that what is hashed is what will be read.
    document = json.loads(json.dumps(document))
    return {**document, "sha256": document_sha256(document)}


def _normaliser(fields: dict[str, Any]) -> Normaliser:
    return Normaliser(mean=tuple(fields["mean"]), std=tuple(fields["std"]), formula=fields["formula"])


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
