"""A stream's state for layers that would keep it on themselves.

In:   a module whose layers hold their past in an attribute, and a State of the caller's.
Out:  within `lend`, layers that continue the caller's stream; after it, the caller's new State and clean layers.
Cost: the tensors that the layers keep, cloned once per call.
Errors: none of its own; an exception inside leaves the layers clean.

One call at a time: `lend` holds a lock, so a module may be shared between threads, each with streams of its own.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from models.causal import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


class LentState:
    """The layers of a module that keep a past in `attribute`, None standing for the start of a clip."""

    def __init__(self, module: nn.Module, attribute: str) -> None:
        self.attribute = attribute
        self.layers: dict[str, Any] = {
            name: layer for name, layer in module.named_modules() if hasattr(layer, attribute)
        }
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lend(self, state: State) -> Iterator[State]:
        """Let the layers continue from `state`, empty at a clip's start; what they keep is in the given dictionary."""
        following: State = {}
        with self._lock:
            try:
                for name, layer in self.layers.items():
                    self.put(layer, state.get(name))
                yield following
                following.update(
                    (name, self.kept(layer).clone())
                    for name, layer in self.layers.items()
                    if getattr(layer, self.attribute) is not None
                )
            finally:
                for layer in self.layers.values():
                    self.put(layer, None)

    def put(self, layer: Any, past: Tensor | None) -> None:
        """Set a layer's past."""
        setattr(layer, self.attribute, past)

    def kept(self, layer: Any) -> Tensor:
        """What of a layer's past its next call reads."""
        past: Tensor = getattr(layer, self.attribute)
        return past
