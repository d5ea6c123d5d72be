"""One autoencoder encoding random clips one way, in a process of its own, so that its memory is its own.

In:   JSON on stdin: {"model", "how", "compiled", "dtype", "layout", "device", "frames", "size", "repetitions",
      "threads"}.
      how: "plain", the model's own call on the whole clip; "streamed", canonical chunks; "length", chunks that are made
      when they are wanted, so that memory is the model's and the latent's alone.
Out:  JSON on stdout: parameters, kMAC per pixel, frames per second, peak MiB of the timed encodes (of the process; on
      CUDA what torch allocated there), share of the device's matrix rate, the latent's error against float32 (no TF32),
      eager and contiguous, whether float32 convolutions take TF32; or {"error"}.
Cost: what is measured; the full-size models need up to 10 GB.
Errors: a model that cannot be built or run so becomes {"error"}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.autoencoder import CausalAutoencoder
from models.config import PRESETS, ModelConfig
from models.native import NativeBackend
from models.pixels import to_pixels
from models.pretrained import real_configs
from models.spec import Geometry
from models.streamed import EncodesChunks

Json = dict[str, Any]
Encode = Callable[[Tensor], Tensor]
_FORMATS = {"contiguous": "contiguous_format", "channels_last_3d": "channels_last_3d"}


@dataclasses.dataclass(frozen=True)
class Built:
    """A model with random weights; `plain` is its own call on a whole clip, `backend` its streaming side if any."""

    module: nn.Module
    geometry: Geometry
    plain: Encode
    backend: EncodesChunks | None
    move: Callable[[torch.device, torch.dtype], object]


def build(name: str, how: str) -> Built:
    """A preset, or a released model's config.

    Some models are made to stream by replacing their layers: one that is measured "plain" is left untouched.
    """
    torch.manual_seed(0)
    if name in PRESETS:
        model = CausalAutoencoder(ModelConfig(PRESETS[name])).eval()
        return Built(model, model.config.geometry, lambda clip: model.encode(clip).mean, NativeBackend(model), model.to)
    import diffusers

    from models.pretrained.directory import RULES

    class_name, arguments = real_configs()[name]
    vae: Any = getattr(diffusers, class_name)(**arguments).eval()
    rule, config = RULES[class_name], dict(vae.config)
    geometry = rule.geometry(config)
    if rule.whole is not None:
        whole = rule.whole(vae)
        return Built(vae, geometry, lambda clip: whole.encode(clip.float()).mean, None, whole.to)
    assert rule.streamed is not None
    backend = None if how == "plain" else rule.streamed(vae)
    # The override of `to` in diffusers logs a needless warning.
    return Built(vae, geometry, lambda clip: rule.reference(vae, clip), backend, functools.partial(nn.Module.to, vae))


def stream(backend: EncodesChunks, chunks: Iterable[Tensor]) -> Tensor:
    """The latent of a clip that comes in chunks."""
    state, means = None, []
    for chunk in chunks:
        posterior, state = backend.encode_chunk(chunk, state)
        means.append(posterior.mean)
    return torch.cat(means, dim=2)


def measure(spec: Json) -> Json:
    """Build, warm up, repeat; medians."""
    torch.set_num_threads(spec["threads"])
    device, dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
    built = build(spec["model"], spec["how"])
    model, geometry, backend = built.module, built.geometry, built.backend
    if spec["how"] != "plain" and backend is None:
        return {"error": "takes whole clips only"}
    model.requires_grad_(requires_grad=False)
    built.move(device, torch.float32)
    _set_layout(model, "contiguous")
    frames = geometry.frames_on_grid(spec["frames"])
    size = -(-spec["size"] // geometry.spatial_stride) * geometry.spatial_stride
    pixels = frames * size * size
    chunk_frames = geometry.default_chunk_frames

    def noise(num_frames: int) -> Tensor:
        # Through the pipeline's own function: strides decide which convolutions run.
        return to_pixels(torch.randint(256, (1, num_frames, size, size, 3), dtype=torch.uint8, device=device), device)

    def noise_in_chunks() -> Iterator[Tensor]:
        yield from map(noise, _chunks(frames, chunk_frames))

    clip = noise(1 if spec["how"] == "length" else frames)

    def encode() -> Tensor:
        if backend is None or spec["how"] == "plain":
            return built.plain(clip)
        if spec["how"] == "length":
            return stream(backend, noise_in_chunks())
        return stream(backend, _split(clip, _chunks(frames, chunk_frames)))

    with torch.inference_mode():
        with _tf32(torch.backends.cudnn, allowed=False):
            reference = None if spec["how"] == "length" else encode().cpu()
        built.move(device, dtype)
        _set_layout(model, spec["layout"])
        clip = clip.to(dtype)
        kmacs = None if reference is None else _count_macs(encode) / pixels / 1e3
        if spec["compiled"]:
            model.encoder.compile()  # type: ignore[union-attr]
        error_std = None if reference is None else _error_std(encode().cpu(), reference)
        _forget_peak(device)
        seconds = statistics.median(_seconds(encode, device) for _ in range(spec["repetitions"]))
        peak_mib = _peak_mib(device)
    rate = None if kmacs is None else 2e3 * kmacs * pixels / seconds / _matrix_rate(device, dtype)
    parameters = {half: sum(p.numel() for p in getattr(model, half).parameters()) for half in ("encoder", "decoder")}
    return {
        **parameters,
        "shape": [frames, size, size],
        "kmacs_per_pixel": kmacs,
        "frames_per_second": frames / seconds,
        "peak_mib": peak_mib,
        "matrix_share": rate,
        "latent_error_std": error_std,
        "tf32": _takes_tf32(device),
    }


def _set_layout(model: nn.Module, layout: str) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=getattr(torch, _FORMATS[layout]))


def _error_std(latent: Tensor, reference: Tensor) -> float:
    return ((latent.float() - reference.float()).abs().max() / reference.float().std()).item()


def _split(clip: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = torch.split(clip, sizes, dim=2)
    return pieces


def _chunks(frames: int, chunk_frames: int) -> list[int]:
    return [1, *(min(chunk_frames, frames - start) for start in range(1, frames, chunk_frames))]


def _count_macs(encode: Callable[[], Tensor]) -> float:
    from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

    def of_small_clips(x: list[int], weight: list[int], *_: object, out_shape: list[int], **__: object) -> int:
        return conv_flop_count(x, weight, out_shape)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_convolution: of_small_clips}) as counter:
        encode()
    return float(counter.get_total_flops()) / 2


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    began = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a large matrix product here, rounded as convolutions are: 100 %."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    with _tf32(torch.backends.cuda.matmul, allowed=_takes_tf32(device)):
        seconds = min(_seconds(lambda: left @ right, device) for _ in range(5))
    return 2.0 * side * side * side / seconds


def _takes_tf32(device: torch.device) -> bool:
    """Whether float32 convolutions round to TF32: cuDNN's do, unless told otherwise; matrix products do not."""
    return device.type == "cuda" and torch.backends.cudnn.allow_tf32


@contextlib.contextmanager
def _tf32(backend: Any, *, allowed: bool) -> Iterator[None]:
    """With TF32 or without in torch.backends.cudnn or .cuda.matmul (cudnn.flags would switch cuDNN itself off)."""
    before, backend.allow_tf32 = backend.allow_tf32, allowed
    try:
        yield
    finally:
        backend.allow_tf32 = before


def _forget_peak(device: torch.device) -> None:
    """So that neither the float32 reference nor counting, compiling and warming up count."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not ru_maxrss: a child takes that over from the process that started it.
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def main() -> None:
    """Measure once."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    try:
        result = measure(json.load(sys.stdin))
    # What a released class, a dtype or torch.compile raises where it cannot: a row of the table that says so.
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        result = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:100]}
    print(json.dumps(result), file=reply, flush=True)


if __name__ == "__main__":
    main()
