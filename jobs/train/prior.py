"""`train prior`: learn how the codes of a store's latents go together, so that new ones can be sampled.

In:   a finished store that a discrete model of ours made, and that model.
Out:  a prior's directory, which `sample --prior` takes; its bits per code on stdout.
Cost: the seconds or steps that it is given; latents are read as they are needed.
Errors: UsageError for stores and models that do not fit, and for flags that cannot be.

The last eighth of each bucket's clips is held out: it tells whether the prior knows more than the clips that it has
learned from.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jobs.generate import open_autoencoder
from jobs.inspect_store import require_encoder_of
from jobs.progress import format_seconds
from jobs.train.config import TrainPrior
from pipeline.buckets import Bucket
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from models.autoencoder import CausalAutoencoder
    from models.generative.prior_config import PriorConfig
    from models.generative.prior_training import Grids, TrainedPrior
    from pipeline.reader import LatentDataset

_HELD_OUT_SHARE = 8
_PROGRESS_SECONDS = 10.0


def run_train_prior(command: TrainPrior) -> int:
    """`latentmill train prior --store S --output DIR`."""
    import torch

    from models.generative.prior_checkpoint import save_prior
    from models.generative.prior_training import PriorSettings, train_prior
    from pipeline.reader import LatentDataset

    if command.output.exists():
        raise UsageError(f"--output {command.output} exists already: name a new directory, or remove it")
    torch.set_num_threads(command.threads)
    dataset = LatentDataset(command.store, normalise=False)
    source = command.encoder or dataset.header.encoder_source
    encoder, model = open_autoencoder(source)
    autoencoder = encoder.card.fingerprint
    require_encoder_of(dataset.header, source, autoencoder)
    config = _prior_config(command, model, dataset)
    batches = CodeBatches(dataset, model, command.batch_size, command.seed)
    try:
        trained = train_prior(
            config,
            batches.to_learn(),
            steps=command.steps,
            time_limit_seconds=command.seconds,
            settings=PriorSettings(learning_rate=command.learning_rate, seed=command.seed),
            progress=_Progress(),
        )
    except ValueError as error:
        raise UsageError(f"the prior cannot be trained: {error}") from error
    fingerprint = save_prior(command.output, trained.prior, autoencoder)
    print(f"trained a prior over {config.codebook_sizes} codes for {trained.steps} steps")
    print(f"bits per code: {_bits(config, trained, batches)}")
    print(f"prior: {command.output} (fingerprint {fingerprint[:12]}, of the model {autoencoder[:12]})")
    return 0


class CodeBatches:
    """Batches of grids of codes from a store, each of one bucket.

    The codes are those that the stored latents stand for: latents are unnormalised, as `latent_to_grids` takes them.
    """

    def __init__(self, dataset: LatentDataset, model: CausalAutoencoder, batch_size: int, seed: int) -> None:
        self._dataset, self._model = dataset, model
        self._batch_size, self._seed = batch_size, seed
        buckets = [dataset.items_of(bucket) for bucket in dataset.buckets()]
        kept = [len(items) - len(items) // _HELD_OUT_SHARE for items in buckets]
        self._learned = [items[:count] for items, count in zip(buckets, kept, strict=True)]
        self._held_out = [items[count:] for items, count in zip(buckets, kept, strict=True)]

    def to_learn(self) -> Iterator[Grids]:
        """Endless batches, shuffled by (seed, epoch)."""
        epoch = 0
        while True:
            order = np.random.default_rng([self._seed, epoch])
            batches = self._slices([order.permutation(items) for items in self._learned])
            for number in order.permutation(len(batches)):
                yield self._read(batches[number])
            epoch += 1

    def held_out(self) -> Iterator[Grids]:
        """The held-out clips once, in their order."""
        yield from map(self._read, self._slices(self._held_out))

    @property
    def num_held_out(self) -> int:
        """Clips that are held out."""
        return sum(map(len, self._held_out))

    def _slices(self, buckets: Sequence[np.ndarray]) -> list[np.ndarray]:
        size = self._batch_size
        return [items[start : start + size] for items in buckets for start in range(0, len(items), size)]

    def _read(self, items: np.ndarray) -> Grids:
        import torch

        from models.generative.codes import latent_to_grids

        latents = torch.stack([self._dataset[int(item)]["latent"] for item in items])
        return latent_to_grids(self._model, latents)


def _prior_config(command: TrainPrior, model: CausalAutoencoder, dataset: LatentDataset) -> PriorConfig:
    """A prior over the model's codes, for grids up to the largest of the store's buckets."""
    from models.generative.codes import code_extents, codebook_sizes
    from models.generative.prior_config import PriorConfig

    buckets = [Bucket.parse(name) for name in dataset.buckets()]
    shapes = [code_extents(model.config, bucket.num_frames, bucket.height, bucket.width) for bucket in buckets]
    largest = tuple(
        (max(t), max(h), max(w)) for t, h, w in (zip(*level, strict=True) for level in zip(*shapes, strict=True))
    )
    try:
        return PriorConfig(codebook_sizes(model), largest, command.width, command.depth, command.heads)
    except (TypeError, ValueError) as error:
        raise UsageError(f"no prior over the latents of {command.store}: {error}") from error


def _bits(config: PriorConfig, trained: TrainedPrior, batches: CodeBatches) -> str:
    """How well the prior knows the codes, beside one that knows nothing."""
    from models.generative.prior_training import measure_bits_per_code

    told = f"{trained.bits_per_code:.3f} in the last steps"
    if batches.num_held_out:
        bits = measure_bits_per_code(trained.prior, batches.held_out())
        told += f", {bits:.3f} on {batches.num_held_out} clips held out"
    else:
        told += ", none held out (fewer than 8 clips per bucket)"
    sizes = {size for level in config.codebook_sizes for size in level}
    return told + f" (uniform: {' or '.join(f'{math.log2(size):.3f}' for size in sorted(sizes))})"


class _Progress:
    """Prints the bits per code now and then."""

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()

    def __call__(self, step: int, bits_per_code: float) -> None:
        now = time.monotonic()
        if now - self._printed < _PROGRESS_SECONDS:
            return
        self._printed = now
        elapsed = format_seconds(now - self._started)
        print(f"train prior: step {step}, {elapsed}: {bits_per_code:.3f} bits per code", file=sys.stderr, flush=True)
