"""What a learned prior over codes is built from, as a frozen record.

In:   codebook sizes and largest grids of an autoencoder (models.generative.codes); width, depth, heads; or JSON.
Out:  PriorConfig.
Cost: none; no torch.
Errors: ValueError names the field that cannot be, with its value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CODES = 1 << 20  # each is a vector to look up and one to compare with


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    """A causal transformer over grids of codes.

    codebook_sizes: of each level, the codes of each of its codebooks.
    max_extents: of each level, the largest (t, h, w) that positions are learned for; smaller grids fit as well.
    width: channels of the transformer. depth: blocks. heads: of attention, which divide the width.
    """

    codebook_sizes: tuple[tuple[int, ...], ...]
    max_extents: tuple[tuple[int, int, int], ...]
    width: int = 128
    depth: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        if not self.codebook_sizes or any(not sizes or min(sizes) < 2 for sizes in self.codebook_sizes):
            raise ValueError(f"codebook_sizes are at least 2, one or more per level, got {self.codebook_sizes}")
        if sum(map(sum, self.codebook_sizes)) > MAX_CODES:
            raise ValueError(f"a prior knows at most {MAX_CODES} codes one by one, got {self.codebook_sizes}")
        if len(self.max_extents) != len(self.codebook_sizes):
            raise ValueError(f"max_extents needs one (t, h, w) for each of {len(self.codebook_sizes)} levels")
        if any(len(extents) != 3 or min(extents) < 1 for extents in self.max_extents):
            raise ValueError(f"max_extents are (t, h, w) of at least 1, got {self.max_extents}")
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise ValueError(
                f"width, depth and heads are at least 1 and heads divides width, "
                f"got {self.width=} {self.depth=} {self.heads=}"
            )

    def check_extents(self, extents: Sequence[tuple[int, int, int]]) -> None:
        """Refuse grids that are larger than the largest, or of another number of levels."""
        if len(extents) != len(self.max_extents):
            raise ValueError(f"this prior is over {len(self.max_extents)} levels of codes, got {len(extents)}")
        for extent, largest in zip(extents, self.max_extents, strict=True):
            if any(not 1 <= side <= limit for side, limit in zip(extent, largest, strict=True)):
                raise ValueError(
                    f"a grid of codes {_by(extent)} does not fit into {_by(largest)}, this prior's largest"
                )

    def num_codes(self, extents: Sequence[tuple[int, int, int]]) -> int:
        """Codes of one clip with grids of these extents: the length of the sequence."""
        return sum(math.prod(extent) * len(sizes) for extent, sizes in zip(extents, self.codebook_sizes, strict=True))

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_json` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> PriorConfig:
        """Build from `as_json`.

        Raises:
            KeyError, TypeError, ValueError: a field is missing, unknown, or not what it should be.
        """
        lists = {name: tuple(map(tuple, fields[name])) for name in ("codebook_sizes", "max_extents")}
        return cls(**{**fields, **lists})


def _by(extents: tuple[int, int, int]) -> str:
    return "x".join(map(str, extents))
