"""The kinds by name.

In:   a name.
Out:  the class of its record.
Cost: imports torch.
Errors: ValueError lists the names there are.
"""

from __future__ import annotations

from models.kinds.ae import Ae
from models.kinds.contractive_ae import ContractiveAe
from models.kinds.denoising_ae import DenoisingAe
from models.kinds.dvae import Dvae
from models.kinds.fsq_vae import FsqVae
from models.kinds.kind import Kind
from models.kinds.lfq import LfqVae
from models.kinds.rvq import RvqVae
from models.kinds.sparse_ae import SparseAe
from models.kinds.vae import Vae
from models.kinds.vq_gan import VqGan
from models.kinds.vq_vae import VqVae
from models.kinds.vq_vae_2 import VqVae2

_ALL: tuple[type[Kind], ...] = (
    Ae,
    DenoisingAe,
    SparseAe,
    ContractiveAe,
    Vae,
    VqVae,
    VqVae2,
    VqGan,
    RvqVae,
    FsqVae,
    LfqVae,
    Dvae,
)
KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in _ALL}


def kind_class(name: str) -> type[Kind]:
    """The record class of a kind."""
    if name not in KINDS:
        raise ValueError(f"no model kind {name!r}: use one of {', '.join(KINDS)}")
    return KINDS[name]
