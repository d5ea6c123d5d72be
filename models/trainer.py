"""Training step by step: gradients, average, schedule, an adversary where there is one, and a state to go on from.

In:   an Objective (models.kinds) on its device, and batches of pixels, B 3 T H W, of any mix of sizes on the grid.
Out:  the losses of each step; the averaged (EMA) model; the state, from which another Trainer goes on bit for bit
      (on one machine and thread count).
Cost: one forward and one backward pass per step; memory is that of one batch, and four copies of the weights.
Errors: ValueError for settings that cannot be, a loss that is no longer finite, another model's state.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.bottlenecks.ranks import rank, sum_over_ranks, world_size
from models.optimiser import ClippedAdamW

if TYPE_CHECKING:
    from models.autoencoder import CausalAutoencoder
    from models.kinds.kind import Adversary, DiscriminatorTerms, Objective
    from models.train_settings import TrainSettings

Wrap = Callable[[nn.Module], nn.Module]

BETAS = (0.9, 0.95)
ADVERSARY_BETAS = (0.5, 0.9)  # Esser et al., arXiv:2012.09841: little momentum against a moving opponent


class Trainer:
    """One optimiser step after another, on the device that the objective is on.

    `wrap` makes the module that runs each pass, for data-parallel training: it is given the objective, and a module of
    its own for the adversary. Each rank then makes its steps at the same time, on its own part of each batch; losses
    are means over all ranks. `seed` is of the noise that kinds add, which differs from rank to rank.

    Attributes:
        model: what learns. average: the mean of its weights over the last steps, with its buffers, in eval mode.
        step: optimiser steps made.
    """

    def __init__(
        self, objective: Objective, settings: TrainSettings, *, seed: int = 0, wrap: Wrap = lambda module: module
    ) -> None:
        self.settings = settings
        self.model = objective.model
        self.adversary = objective.adversary
        self.step = 0
        objective.train()
        self.model.requires_grad_()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(requires_grad=False)
        if settings.freeze_encoder:
            _freeze_encoder(self.model)
        self._optimiser = self._optimiser_of(self.model, BETAS)
        self._noise = torch.Generator(next(self.model.parameters()).device)
        self._noise_seeds = torch.Generator().manual_seed(seed)  # alike on all ranks, so that one of them keeps it
        if self.adversary is not None:
            self.adversary.requires_grad_()  # another trainer, before this one, left it without
            self._discriminate = wrap(_DiscriminatorPass(self.adversary))
            self._adversary_optimiser = self._optimiser_of(self.adversary, ADVERSARY_BETAS)
            self.adversary.requires_grad_(requires_grad=False)
        if settings.precision == "bfloat16":
            _keep_norms_in_float32(objective)
        self._objective = wrap(objective)

    def train_step(self, pixels: Tensor, done: float = 0.0) -> dict[str, float]:
        """Learn from one batch, B 3 T H W in [-1, 1], and return its losses by name.

        `done` is the share of the training that is behind, 0 to 1: where on the cosine the learning rate stands.

        Raises:
            ValueError: the loss is not finite, or the batch has no equal parts.
        """
        self._noise.manual_seed(int(torch.randint(1 << 62, (), generator=self._noise_seeds)) + rank())
        learning_rate = self.learning_rate(done)
        parts = self._micro_batches(pixels)
        losses, reconstructions = self._learn(parts, learning_rate)
        if self.adversary is not None:
            losses |= self._learn_to_discriminate(self.adversary, parts, reconstructions, learning_rate)
        self.step += 1
        _update_average(self.average, self.model, min(self.settings.ema_decay, (1 + self.step) / (10 + self.step)))
        return losses

    def learning_rate(self, done: float) -> float:
        """Of the next step, at that share of the training."""
        return self.settings.learning_rate * _schedule(self.settings, self.step, done)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next steps depend on: a copy, in flat tensors by name, on the CPU, as safetensors takes them."""
        tensors = {
            **self._fixed_state(),
            **_with_prefix("optimiser", self._optimiser.state_dict()),
            **(_with_prefix("adversary_optimiser", self._adversary_optimiser.state_dict()) if self.adversary else {}),
        }
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that a trainer of the same kind, backbone and settings gave.

        Raises:
            ValueError: it is of another model.
        """
        wanted = self._fixed_state()
        found = {name: value for name, value in state.items() if "optimiser" not in name.split(".")[0]}
        wrong = sorted(
            name
            for name in wanted.keys() | found.keys()
            if name not in wanted or name not in found or wanted[name].shape != found[name].shape
        )
        if wrong:
            raise ValueError(
                f"this training state is of another model: it differs at {', '.join(wrong[:4])} ({len(wrong)} in all)"
            )
        with torch.no_grad():
            for name, value in self._modules_state().items():
                value.copy_(state[name])
        self.step = int(state["step"])
        self._noise_seeds.set_state(state["noise"].cpu())
        self._optimiser.load_state_dict(_without_prefix("optimiser", state))
        if self.adversary is not None:
            self._adversary_optimiser.load_state_dict(_without_prefix("adversary_optimiser", state))

    def _fixed_state(self) -> dict[str, Tensor]:
        """What is there from the first step on, and always of one shape."""
        return {"step": torch.tensor(self.step), "noise": self._noise_seeds.get_state(), **self._modules_state()}

    def _modules_state(self) -> dict[str, Tensor]:
        modules: dict[str, nn.Module | None] = {
            "model": self.model,
            "average": self.average,
            "adversary": self.adversary,
        }
        return {
            name: value
            for prefix, module in modules.items()
            if module is not None
            for name, value in _with_prefix(prefix, module.state_dict()).items()
        }

    def _micro_batches(self, pixels: Tensor) -> Sequence[Tensor]:
        count = self.settings.micro_batches
        if pixels.shape[0] % count:
            raise ValueError(f"a batch of {pixels.shape[0]} clips has no {count} equal parts: change micro_batches")
        return pixels.chunk(count)

    def _learn(self, parts: Sequence[Tensor], learning_rate: float) -> tuple[dict[str, float], list[Tensor]]:
        meter, reconstructions = _LossMeter(), []
        for number, part in enumerate(parts, start=1):
            with _gradients_of(self._objective, shared=number == len(parts)):
                with self._autocast(part):
                    terms = self._objective(part, step=self.step, generator=self._noise)
                meter.add({"loss": terms.loss, **terms.values})
                reconstructions.append(terms.reconstruction.pixels.detach())
                (terms.loss / len(parts)).backward()
        return self._checked(meter, "loss", self._optimiser, learning_rate), reconstructions

    def _learn_to_discriminate(
        self, adversary: Adversary, parts: Sequence[Tensor], reconstructions: Sequence[Tensor], learning_rate: float
    ) -> dict[str, float]:
        adversary.requires_grad_()
        meter = _LossMeter()
        for number, (part, reconstruction) in enumerate(zip(parts, reconstructions, strict=True), start=1):
            with _gradients_of(self._discriminate, shared=number == len(parts)):
                with self._autocast(part):
                    terms = self._discriminate(part, reconstruction, self.step)
                if terms is not None:
                    meter.add({"discriminator": terms.loss, **terms.values})
                    (terms.loss / len(parts)).backward()
        adversary.requires_grad_(requires_grad=False)
        if not meter.count:
            return {}
        return self._checked(meter, "discriminator", self._adversary_optimiser, learning_rate)

    def _checked(self, meter: _LossMeter, loss: str, optimiser: ClippedAdamW, learning_rate: float) -> dict[str, float]:
        """Step, if the loss is finite."""
        losses = meter.means()
        if not math.isfinite(losses[loss]):
            raise ValueError(f"the loss is not finite: {losses}; lower learning_rate ({self.settings.learning_rate})")
        optimiser.step(learning_rate)
        return losses

    def _autocast(self, pixels: Tensor) -> torch.autocast:
        return torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def _optimiser_of(self, module: nn.Module, betas: tuple[float, float]) -> ClippedAdamW:
        settings = self.settings
        return ClippedAdamW(module, betas, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm)


class _LossMeter:
    """Means of losses by name, over parts and ranks, brought to the CPU once."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
        self.count += 1

    def means(self) -> dict[str, float]:
        values = sum_over_ranks(torch.stack(list(self._sums.values()))) / (self.count * world_size())
        return dict(zip(self._sums, values.tolist(), strict=True))


def _gradients_of(module: nn.Module, *, shared: bool) -> contextlib.AbstractContextManager[None]:
    """Ranks add up their gradients once a step, with those of the last part; a plain module has no ranks."""
    if shared or not isinstance(module, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


class _DiscriminatorPass(nn.Module):
    """The adversary's pass as a module, which is what data-parallel training can wrap."""

    def __init__(self, adversary: Adversary) -> None:
        super().__init__()
        self.adversary = adversary

    def forward(self, pixels: Tensor, reconstruction: Tensor, step: int) -> DiscriminatorTerms | None:
        return self.adversary.discriminator_terms(pixels, reconstruction, step)


def _schedule(settings: TrainSettings, step: int, done: float) -> float:
    """Linear warm-up times a cosine from 1 to the final ratio (Loshchilov and Hutter, arXiv:1608.03983)."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return warmup * (settings.final_learning_rate_ratio + (1 - settings.final_learning_rate_ratio) * cosine)


def _freeze_encoder(model: CausalAutoencoder) -> None:
    """Everything but the decoder; in eval mode, so that codebooks that are averages stay as they are, too."""
    for name, part in model.named_children():
        if name != "decoder":
            part.requires_grad_(requires_grad=False).eval()


def _keep_norms_in_float32(module: nn.Module) -> None:
    """Autocast leaves an RMS norm in whatever precision it is given."""
    for norm in module.modules():
        if isinstance(norm, nn.RMSNorm):
            norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Averages parameters and takes over buffers: a codebook among them is an average already, and may jump."""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def _without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
