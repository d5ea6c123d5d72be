"""A prior on disk: a model directory (models.model_directory) bound to the autoencoder whose codes it knows.

In:   a CodePrior and its autoencoder's fingerprint; or such a directory and a fingerprint.
Out:  the directory, whole or not there at all; or the prior, after every byte was checked.
Cost: saving and loading read or write the weights once, hashing them as well.
Errors: CheckpointError names the file that is missing, damaged, of another kind, or of another autoencoder. Nothing is
        ever unpickled.
"""

from __future__ import annotations

from pathlib import Path

import torch

from models.errors import CheckpointError
from models.generative.prior import CodePrior
from models.generative.prior_config import PriorConfig
from models.model_directory import CONFIG_FILE, DirectoryFormat, check_weights, fill, read_directory, write_directory

FORMAT = DirectoryFormat("latentmill.prior", 1, "CodePrior", "prior")


def save_prior(directory: Path, prior: CodePrior, autoencoder: str) -> str:
    """Write a new directory and return the prior's fingerprint. `autoencoder` is the fingerprint of its autoencoder.

    Raises:
        CheckpointError: the directory exists; none is ever overwritten.
    """
    return write_directory(directory, FORMAT, prior, prior.config.as_json(), {"autoencoder": autoencoder})


def load_prior(directory: Path, autoencoder: str) -> CodePrior:
    """Load the prior of the autoencoder with that fingerprint, on the CPU, in eval mode, with no gradients.

    Raises:
        CheckpointError: a file is missing or damaged, or the prior belongs to another autoencoder.
    """
    document = read_directory(directory, FORMAT)
    try:
        owner, config = str(document["autoencoder"]), PriorConfig.from_json(document["config"])
        identity = document["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: holds no valid prior: {error}") from error
    if owner != autoencoder:
        raise CheckpointError(
            f"{directory}: is a prior over the codes of the autoencoder {owner[:12]}, "
            f"not of {autoencoder[:12]}: train one with `latentmill train prior`"
        )
    check_weights(directory, FORMAT, config.as_json(), identity)
    with torch.device("meta"):
        prior = CodePrior(config)
    fill(prior, directory)
    return prior
