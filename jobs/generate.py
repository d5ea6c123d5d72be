"""`sample` and `interpolate`: clips that never were.

In:   a trained model of ours and a prior; or a store, its encoder, and the keys of two clips.
Out:  a film strip and a video of the generated clips.
Cost: one decode per clip; a learned prior, one pass of its transformer per code before.
Errors: UsageError for models, priors, keys, devices and sizes that do not fit; JobError where a GPU has no memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.generate_config import Interpolate, Sample
from jobs.generate_pictures import write_clips
from jobs.inspect_store import find_rows, load_store_encoder, where_keys_are
from models.spec import VideoEncoder
from pipeline.errors import UsageError
from pipeline.filmstrip import LabelledClips, safe_stem
from pipeline.plan import Unit, load_plan
from pipeline.storage import Storage, open_storage
from pipeline.store import Header, open_header, read_unit, to_float32

if TYPE_CHECKING:
    from torch import Tensor

    from models.autoencoder import CausalAutoencoder
    from models.generative.prior import CodePrior
    from models.generative.sampling import PriorName

_STILL_FPS = 1.0


def open_autoencoder(source: str) -> tuple[VideoEncoder, CausalAutoencoder]:
    """A model of ours, whose prior and codes are known, as an encoder and as a module; both are the same weights.

    Raises:
        UsageError: the source is no checkpoint of ours, or a damaged one.
    """
    import torch

    from models.checkpoint import is_checkpoint
    from models.encoders import resolve_source
    from models.native import load_native
    from models.streamed import ChunkedEncoder

    try:
        directory = resolve_source(source)
        if not is_checkpoint(directory):
            raise UsageError(
                f"the encoder {source} is not a model that `latentmill train` made: only of those are the latent's "
                "prior and codes known, which sampling needs"
            )
        card, backend = load_native(directory)
    except ValueError as error:
        raise UsageError(f"the encoder {source} cannot be loaded: {error}") from error
    return ChunkedEncoder(card, backend, "cpu", torch.float32), backend.model


def run_sample(command: Sample) -> int:
    """`latentmill sample --encoder DIR --output DIR`."""
    import torch

    from models.generative.sampling import prior_names, sample_latents

    encoder, model = open_autoencoder(command.encoder)
    prior = _find_prior(command.prior or prior_names(model)[0], encoder.card.fingerprint)
    try:
        latents = sample_latents(
            model,
            encoder.card.normaliser,
            prior,
            command.num,
            (command.frames, command.size, command.size),
            temperature=command.temperature,
            top_k=command.top_k,
            generator=torch.Generator().manual_seed(command.seed),
        )
    except ValueError as error:
        raise UsageError(f"cannot sample from {command.encoder}: {error}") from error
    title = f"{command.num} samples of {encoder.card.name} {encoder.card.fingerprint[:12]}"
    settings = f"prior {prior if isinstance(prior, str) else command.prior}, temperature {command.temperature:g}"
    settings += (f", top {command.top_k}" if command.top_k else "") + f", seed {command.seed}"
    clips = _decode(encoder, [f"sample {number}" for number in range(command.num)], latents)
    paths = write_clips(command.output / "samples", clips, command.fps, title, settings)
    print(f"{title}, {settings} -> {', '.join(map(str, paths))}")
    return 0


def _find_prior(name: str, autoencoder: str) -> PriorName | CodePrior:
    """The prior of that name; or the one in that directory, which must belong to the autoencoder."""
    from models.generative.prior_checkpoint import load_prior
    from models.generative.sampling import PRIOR_NAMES

    for known in PRIOR_NAMES:
        if name == known:
            return known
    if not Path(name).is_dir():
        raise UsageError(f"--prior {name}: neither one of {', '.join(PRIOR_NAMES)} nor the directory of a prior")
    try:
        return load_prior(Path(name), autoencoder)
    except ValueError as error:
        raise UsageError(f"--prior {name} cannot be loaded: {error}") from error


def run_interpolate(command: Interpolate) -> int:
    """`latentmill interpolate KEY1 KEY2 --store S`."""
    if len(command.keys) != 2:
        raise UsageError(
            f"interpolate needs two KEYs, got {' '.join(command.keys) or 'none'}: {where_keys_are(command.store)}"
        )
    storage = open_storage(command.store)
    header = open_header(storage)
    found = find_rows(storage, load_plan(storage, header.recipe), command.keys, command.window)
    (first, first_line), (last, last_line) = (found[key] for key in command.keys)
    if first.bucket != last.bucket:
        raise UsageError(
            f"{command.keys[0]} is in bucket {first.bucket.name}, {command.keys[1]} in {last.bucket.name}: "
            "only clips of one size can be interpolated"
        )
    ends = [_stored_latent(storage, header, first, first_line), _stored_latent(storage, header, last, last_line)]
    encoder = load_store_encoder(header, command.encoder, command.device)
    latents, labels = _between(command, ends, header)
    sampling = header.recipe.sampling
    fps = sampling.fps or first_line["source_fps"] / sampling.frame_step or _STILL_FPS
    name = f"{command.keys[0]} to {command.keys[1]}" + (f" window {command.window}" if command.window else "")
    stem = command.output / safe_stem(name)
    subtitle = f"{command.path} in {command.steps} steps, {header.recipe.encoder.name}"
    paths = write_clips(stem, _decode(encoder, labels, latents), fps, name, subtitle)
    print(f"{name}: {subtitle} -> {', '.join(map(str, paths))}")
    return 0


def _stored_latent(storage: Storage, header: Header, unit: Unit, line: dict[str, Any]) -> Tensor:
    """A written row's latent, 1 C t h w, unnormalised."""
    import torch

    recipe = header.recipe
    row = read_unit(storage, recipe, unit)[line["row"] - unit.number * recipe.unit_rows(unit.bucket)]
    return torch.from_numpy(to_float32(row, recipe.encode.dtype)[None, : recipe.encoder.geometry.channels])


def _between(command: Interpolate, ends: list[Tensor], header: Header) -> tuple[Tensor, list[str]]:
    """Latents from one end to the other, and how each is called.

    The sphere is around the normaliser's mean, in units of its std: around the origin of latents that were not trained
    towards it, it would mean nothing. A line is the same line either way.
    """
    import torch

    from models.generative.interpolation import interpolate

    normaliser = header.recipe.encoder.normaliser
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (normaliser.mean, normaliser.std))
    first, last = ((end - mean) / std for end in ends)
    latents = interpolate(first, last, command.steps, command.path)[:, 0] * std + mean
    shares = torch.linspace(0, 1, command.steps).tolist()
    return latents, [command.keys[0], *(f"{share:.0%}" for share in shares[1:-1]), command.keys[1]]


def _decode(encoder: VideoEncoder, labels: list[str], latents: Tensor) -> LabelledClips:
    """One clip at a time, so that memory does not grow with their number but by the frames."""
    from pipeline.verify import decode_latent

    return [(label, decode_latent(encoder, latent)) for label, latent in zip(labels, latents, strict=True)]
