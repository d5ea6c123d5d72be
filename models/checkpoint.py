"""Our autoencoders on disk: model directories (models.model_directory) with a config and a normaliser.

In:   a CausalAutoencoder and its Normaliser; or such a directory.
Out:  the directory; or both again, bit for bit, after every byte was checked.
Cost: saving and loading read or write the weights once, hashing them as well.
Errors: CheckpointError names the file that is missing, damaged or of another kind. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from models import model_directory
from models.config import ModelConfig
from models.errors import CheckpointError
from models.model_directory import CONFIG_FILE, DirectoryFormat
from models.spec import Normaliser

if TYPE_CHECKING:
    from pathlib import Path

    from models.autoencoder import CausalAutoencoder

KIND = "CausalAutoencoder"
FORMAT = DirectoryFormat("latentmill.model", 2, KIND, "model")


@dataclasses.dataclass(frozen=True)
class ModelDocument:
    """What `config.json` says. `fingerprint` is of kind, config and weights, as in models.weights."""

    config: ModelConfig
    normaliser: Normaliser
    fingerprint: str


def save_checkpoint(directory: Path, model: CausalAutoencoder, normaliser: Normaliser) -> str:
    """Write a new checkpoint directory and return the model's fingerprint.

    Raises:
        CheckpointError: the directory exists, or the normaliser is not of this model.
    """
    channels = model.config.geometry.channels
    if len(normaliser.mean) != channels:
        raise CheckpointError(f"{directory}: the normaliser has {len(normaliser.mean)} channels, the model {channels}")
    fields = {"normaliser": dataclasses.asdict(normaliser)}
    return model_directory.write_directory(directory, FORMAT, model, model.config.as_json(), fields)


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory claims to be one of ours: its config.json says so."""
    try:
        document = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT.name


def read_document(directory: Path) -> ModelDocument:
    """Read and check `config.json`, without the weights."""
    document = model_directory.read_directory(directory, FORMAT)
    try:
        return ModelDocument(
            ModelConfig.from_json(document["config"]), _normaliser(document["normaliser"]), document["fingerprint"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: holds no valid model: {error}") from error


def check_weights(directory: Path, document: ModelDocument) -> None:
    """Hash the weights and compare with what `config.json` says.

    Raises:
        CheckpointError: any byte, name, dtype or shape differs.
    """
    model_directory.check_weights(directory, FORMAT, document.config.as_json(), document.fingerprint)


def load_checkpoint(directory: Path) -> tuple[CausalAutoencoder, ModelDocument]:
    """Load a checkpoint on the CPU, in eval mode, with no gradients, after checking every byte.

    Raises:
        CheckpointError: a file is missing, damaged or not of this model.
    """
    import torch

    from models.build import build_model

    document = read_document(directory)
    check_weights(directory, document)
    with torch.device("meta"):  # no random weights are drawn that would be thrown away
        model = build_model(document.config)
    model_directory.fill(model, directory)
    model.lay_out()
    return model, document


def _normaliser(fields: dict[str, Any]) -> Normaliser:
    return Normaliser(mean=tuple(fields["mean"]), std=tuple(fields["std"]), formula=fields["formula"])
