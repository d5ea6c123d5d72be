"""AdamW with clipping, and a state that is flat tensors under the parameters' names.

In:   a module whose parameters have gradients.
Out:  its parameters, stepped; the state, which fits a safetensors file.
Cost: two copies of the parameters.
Errors: ValueError for a state of another module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ClippedAdamW:
    """AdamW over what a module learns, with clipping; its state under the names of the parameters.

    Loshchilov and Hutter, arXiv:1711.05101.
    """

    def __init__(self, module: nn.Module, betas: tuple[float, float], *, weight_decay: float, clip_norm: float) -> None:
        self._parameters = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self._clip_norm = clip_norm
        self._adamw = torch.optim.AdamW(self._parameters.values(), betas=betas, weight_decay=weight_decay)

    def step(self, learning_rate: float) -> None:
        """Clip, step, and forget the gradients."""
        nn.utils.clip_grad_norm_(self._parameters.values(), self._clip_norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages of each parameter as "<parameter>.<average>"; the optimiser's own tensors."""
        return {
            f"{name}.{key}": value
            for name, weight in self._parameters.items()
            for key, value in self._adamw.state[weight].items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a copy of a state."""
        self._adamw.state.clear()
        for path, value in state.items():
            name, _, key = path.rpartition(".")
            if name not in self._parameters:
                raise ValueError(f"this training state is of another model: it has an optimiser's {path}")
            weight = self._parameters[name]
            # In the weight's own memory layout; the count of steps stays where it is.
            own = value.clone() if key == "step" else torch.zeros_like(weight).copy_(value)
            self._adamw.state[weight][key] = own
