"""The operations that cross time, and the state by which they run on a clip in pieces.

In:   features B C T H W, and a State when the clip comes in chunks.
Out:  features; the State then holds each layer's last kernel - stride input frames, and nothing else.
Cost: one concatenation per convolution; the state's size does not depend on the clip's length.
Errors: none of their own; frame counts are checked where a clip enters (models.autoencoder).

A clip's first frame is special: it makes a latent frame alone, where every other latent frame has a group of frames.
So a convolution sees the first frame repeated to its left, a space-to-depth step repeats it stride - 1 times, and
1 + stride * k frames become 1 + k. What a convolution sees in time is its class:

    CausalConv3d    its own frame and those before: keeps kernel - 1 frames
    GroupedConv3d   also those after, to the end of its own group: keeps the one frame before the group
    FrameConv3d     its own frame alone: keeps nothing

A space-to-depth or depth-to-space step has kernel = stride and so keeps no frame.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.config import TemporalMode

State = dict[str, Tensor]
"""Layer name -> the input frames that it needs next. Empty before a clip's first chunk; owned by the caller."""

KERNEL_SIZE = 3
_TORCH_KERNEL_VALUES = 20_480  # of channels x frames x height, as aten/src/ATen/native/Convolution.cpp counts
_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class TemporalConv3d(nn.Module):
    """A 3-D convolution, same size out as in; subclasses say what it sees in time.

    Attributes:
        state_key: the layer's path in its model, given by `name_states`.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel_frames: int, own_tap: int) -> None:
        super().__init__()
        kernel_size = (kernel_frames, KERNEL_SIZE, KERNEL_SIZE)
        self.conv = nn.Conv3d(channels_in, channels_out, kernel_size, padding=(0, KERNEL_SIZE // 2, KERNEL_SIZE // 2))
        self.state_key = ""
        self._start_isometric(own_tap)

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution itself.

        torch leaves small inputs of batch one to a kernel of its own on CPUs, which takes 4 to 18 times as long as
        oneDNN, and whose last bits are not those that the clip gets in a larger batch.
        """
        conv = self.conv
        if self._is_left_to_torch(x):
            sizes = (conv.padding, conv.stride, conv.dilation, conv.groups)
            output: Tensor = torch.ops.aten.mkldnn_convolution(x, conv.weight, conv.bias, *sizes)
        else:
            output = conv(x)
        return output

    def _is_left_to_torch(self, x: Tensor) -> bool:
        is_small = x.shape[0] == 1 and x.shape[1:4].numel() <= _TORCH_KERNEL_VALUES
        is_float32 = x.dtype == self.conv.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return is_small and is_float32 and x.device.type == "cpu" and _ONEDNN and not torch.compiler.is_compiling()

    def _start_isometric(self, own_tap: int) -> None:
        """Start as an orthogonal map of each position (delta-orthogonal, Xiao et al., arXiv:1806.05393).

        Neighbouring pixels are so alike that filters drawn at random would mostly blur; detail then trains slowly.
        """
        assert self.conv.bias is not None
        centre = KERNEL_SIZE // 2
        with torch.no_grad():
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)
            nn.init.orthogonal_(self.conv.weight[:, :, own_tap, centre, centre])


class CausalConv3d(TemporalConv3d):
    """Frame t sees frames t - 2 to t."""

    past_frames = KERNEL_SIZE - 1

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, KERNEL_SIZE, own_tap=-1)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """Convolve one chunk; `state` is read and updated in place, None stands for a whole clip at once."""
        past = _past(self, state)
        if past is None:
            past = x[:, :, :1].expand(-1, -1, self.past_frames, -1, -1)
        # Channels innermost, as models lay out their weights: oneDNN would otherwise copy the joined frames once more.
        x = torch.cat([past.movedim(1, -1), x.movedim(1, -1)], dim=1).movedim(-1, 1)
        if state is not None:
            # A clone, since a view would keep the whole chunk alive.
            state[self.state_key] = x[:, :, x.shape[2] - self.past_frames :].clone()
        return self.convolve(x)


class GroupedConv3d(TemporalConv3d):
    """Frame t sees frames t - 1 to t + 1, but its group's last frame sees itself in the place of the next one.

    A group is the `group_frames` frames of one latent frame; the leading frame is a group of its own. Chunk-causal
    convolution as in DC-VideoGen (Chen et al., arXiv:2509.25182), here with the past across groups.
    """

    def __init__(self, channels_in: int, channels_out: int, group_frames: int) -> None:
        super().__init__(channels_in, channels_out, KERNEL_SIZE, own_tap=KERNEL_SIZE // 2)
        self.group_frames = group_frames

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """Convolve a chunk of whole groups; `state` is read and updated in place, None stands for a whole clip."""
        past = _past(self, state)
        if state is not None:
            state[self.state_key] = x[:, :, -1:].clone()
        outputs = []
        if past is None:
            past, x = x[:, :, :1], x[:, :, 1:]
            outputs.append(self.convolve(past.expand(-1, -1, KERNEL_SIZE, -1, -1)))
        if x.shape[2]:
            outputs.append(self._convolve_groups(past, x))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _convolve_groups(self, past: Tensor, x: Tensor) -> Tensor:
        """All groups at once, folded into the batch: with channels innermost, that needs no copy."""
        groups = torch.unflatten(x.movedim(1, -1), 1, (-1, self.group_frames))
        last = groups[:, :, -1:]
        before = torch.cat([past.movedim(1, -1).unsqueeze(1), last[:, :-1]], dim=1)
        padded = torch.cat([before, groups, last], dim=2)
        output = self.convolve(padded.flatten(0, 1).movedim(-1, 1))
        return torch.unflatten(output.movedim(1, -1), 0, (x.shape[0], -1)).flatten(1, 2).movedim(-1, 1)


class FrameConv3d(TemporalConv3d):
    """Frame t sees frame t."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1, own_tap=0)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """Convolve each frame alone."""
        return self.convolve(x)


ConvFactory = Callable[[int, int], TemporalConv3d]
"""(channels in, channels out) -> a convolution."""


def convolution(mode: TemporalMode, group_frames: int) -> ConvFactory:
    """The convolution of a level at which a latent frame's group has that many frames."""
    if mode == "frame":
        return FrameConv3d
    if mode == "chunk_causal" and group_frames > 1:
        return functools.partial(GroupedConv3d, group_frames=group_frames)
    return CausalConv3d


def starts_clip(conv: TemporalConv3d, state: State | None) -> bool:
    """Whether this chunk is the clip's first, as far as that layer knows: a FrameConv3d never knows of another."""
    return state is None or conv.state_key not in state


def _past(conv: TemporalConv3d, state: State | None) -> Tensor | None:
    return None if state is None else state.get(conv.state_key)


def name_states(model: nn.Module) -> None:
    """Give every convolution of a model its path in the model as the key of its state."""
    for name, module in model.named_modules():
        if isinstance(module, TemporalConv3d):
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
