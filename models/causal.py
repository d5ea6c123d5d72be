"""The two operations that cross time, and the state by which both run on a clip in pieces.

In:   features B C T H W, and a State when the clip comes in chunks.
Out:  features; the State then holds each layer's last kernel - stride input frames, and nothing else.
Cost: one concatenation per convolution; the state's size does not depend on the clip's length.
Errors: none of their own; frame counts are checked where a clip enters (models.vae).

Every temporal layer is strictly causal. A clip's first frame is special: a convolution sees it repeated kernel - 1
times to its left, a space-to-depth step repeats it stride - 1 times, so 1 + stride * k frames become 1 + k.
A space-to-depth or depth-to-space step has kernel = stride and so keeps no frame.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
"""Layer name -> its last kernel - stride input frames. Empty before a clip's first chunk; owned by the caller."""


class CausalConv3d(nn.Module):
    """A 3-D convolution, same size out as in, whose output at frame t sees frames t - kernel + 1 to t."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, kernel_size, padding=(0, kernel_size // 2, kernel_size // 2))
        self.past_frames = kernel_size - 1
        self._start_isometric()
        self.state_key = ""  # the layer's path in its model, given by name_states

    def _start_isometric(self) -> None:
        """Start as an orthogonal map of each position (delta-orthogonal, Xiao et al., arXiv:1806.05393).

        Neighbouring pixels are so alike that filters drawn at random would mostly blur; detail then trains slowly.
        """
        assert self.conv.bias is not None
        centre = self.conv.kernel_size[1] // 2
        with torch.no_grad():
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)
            nn.init.orthogonal_(self.conv.weight[:, :, -1, centre, centre])

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """Convolve one chunk; `state` is read and updated in place, None stands for a whole clip at once."""
        if starts_clip(self, state):
            past = x[:, :, :1].expand(-1, -1, self.past_frames, -1, -1)
        else:
            assert state is not None
            past = state[self.state_key]
        x = torch.cat([past, x], dim=2)
        if state is not None:
            # A clone, since a view would keep the whole chunk alive.
            state[self.state_key] = x[:, :, x.shape[2] - self.past_frames :].clone()
        output: Tensor = self.conv(x)
        return output


def starts_clip(conv: CausalConv3d, state: State | None) -> bool:
    """Whether this chunk is the clip's first, as far as that layer has seen."""
    return state is None or conv.state_key not in state


def name_states(model: nn.Module) -> None:
    """Give every causal convolution of a model its path in the model as the key of its state."""
    for name, module in model.named_modules():
        if isinstance(module, CausalConv3d):
            module.state_key = name


def space_to_depth(x: Tensor, temporal: int, spatial: int, *, first: bool = False) -> Tensor:
    """B C T H W -> B (C temporal spatial spatial) T/temporal H/spatial W/spatial; C is the slowest channel index.

    `first` marks a clip's first chunk: its first frame is repeated to fill the first group.
    """
    if first and temporal > 1:
        x = torch.cat([x[:, :, :1].expand(-1, -1, temporal - 1, -1, -1), x], dim=2)
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // temporal, temporal, h // spatial, spatial, w // spatial, spatial)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, c * temporal * spatial**2, t // temporal, h // spatial, w // spatial)


def depth_to_space(x: Tensor, temporal: int, spatial: int, *, first: bool = False) -> Tensor:
    """The inverse of `space_to_depth`: with `first`, the copies of the first frame are dropped."""
    b, c, t, h, w = x.shape
    c = c // (temporal * spatial**2)
    x = x.reshape(b, c, temporal, spatial, spatial, t, h, w)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, c, t * temporal, h * spatial, w * spatial)
    return x[:, :, temporal - 1 :] if first else x
