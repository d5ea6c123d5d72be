"""Weights on disk with what they are: a directory of `config.json` and `model.safetensors`, whole or not there at all.

In:   a module's tensors, its kind and its config as JSON; or such a directory.
Out:  the directory; or its document, and a module filled with its weights, after every byte was checked.
Cost: saving and loading read or write the weights once, hashing them as well.
Errors: CheckpointError names the file that is missing, damaged or of another kind. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import CheckpointError
from models.weights import document_sha256, fingerprint, read_table

if TYPE_CHECKING:
    from torch import nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class DirectoryFormat:
    """What tells such directories apart: `noun` is for messages, `kind` names the class of the weights."""

    name: str
    version: int
    kind: str
    noun: str


def write_directory(
    directory: Path, form: DirectoryFormat, module: nn.Module, config: Mapping[str, Any], fields: Mapping[str, Any]
) -> str:
    """Write a new directory and return the fingerprint of kind, config and weights. `fields` join the document.

    The directory appears under its name complete or not at all.

    Raises:
        CheckpointError: the directory exists; none is ever overwritten.
    """
    from safetensors.torch import save_file

    if directory.exists():
        raise CheckpointError(f"{directory}: exists already; save to a new directory or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    try:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        save_file(weights, partial / WEIGHTS_FILE)
        identity = fingerprint(form.kind, config, partial / WEIGHTS_FILE)
        document = {
            "format": form.name,
            "format_version": form.version,
            "kind": form.kind,
            "config": config,
            **fields,
            "fingerprint": identity,
        }
        # Through JSON once, so that what is hashed is what will be read.
        document = json.loads(json.dumps(document))
        document["sha256"] = document_sha256(document)
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


def read_directory(directory: Path, form: DirectoryFormat) -> dict[str, Any]:
    """Read and check `config.json`, without the weights."""
    path = directory / CONFIG_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != form.name:
        raise CheckpointError(f'{path}: is not a {form.noun} of ours: it lacks "format": "{form.name}"')
    if document.get("format_version") != form.version:
        raise CheckpointError(
            f"{path}: has format version {document.get('format_version')!r}; this code reads {form.version}"
        )
    claimed = document.pop("sha256", None)
    if claimed != document_sha256(document):
        raise CheckpointError(f"{path}: does not match its own sha256; it was changed after it was saved")
    if document.get("kind") != form.kind:
        raise CheckpointError(
            f"{path}: holds a {form.noun} of kind {document.get('kind')!r}; this code builds {form.kind}"
        )
    return document


def check_weights(directory: Path, form: DirectoryFormat, config: Mapping[str, Any], identity: str) -> None:
    """Hash the weights and compare with the fingerprint that `config.json` states.

    Raises:
        CheckpointError: any byte, name, dtype or shape differs.
    """
    path = directory / WEIGHTS_FILE
    if fingerprint(form.kind, config, path) != identity:
        raise CheckpointError(f"{path}: is not the file that {CONFIG_FILE} was saved with; its fingerprint differs")


def fill(module: nn.Module, directory: Path) -> None:
    """Give a module that was built on the meta device its weights, on the CPU, in eval mode, with no gradients.

    Raises:
        CheckpointError: names or shapes are not the module's.
    """
    from safetensors.torch import load_file

    path = directory / WEIGHTS_FILE
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: entry.shape for name, entry in read_table(path).items()}
    if wanted != found:
        names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(f"{path}: does not fit its config at {', '.join(names[:4])} ({len(names)} in all)")
    module.load_state_dict(load_file(path), assign=True)
    module.eval().requires_grad_(requires_grad=False)


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
