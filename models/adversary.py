"""A discriminator that learns beside the autoencoder, as in VQ-GAN. Esser et al., arXiv:2012.09841.

In:   clips and their reconstructions, float B 3 T H W; the optimiser step.
Out:  what the autoencoder adds to its loss, and the loss of the discriminator, each with its parts by name.
Cost: from `start_step` on, one discriminator pass in the generator's turn and two in its own, and two gradients at the
      decoder's last layer.
Errors: ValueError for settings that cannot be, and for frames too small for the discriminator.

Which bottleneck the autoencoder has is of no consequence here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.bottlenecks.ranks import sum_over_ranks, world_size
from models.discriminators import Dimensions, PatchDiscriminator
from models.kinds.kind import Adversary, DiscriminatorTerms

GanLoss = Literal["hinge", "non_saturating"]


@dataclasses.dataclass(frozen=True)
class AdversarySettings:
    """The discriminator, and how hard it pulls.

    discriminator: "2d" judges single frames, "3d" motion too. channels: of its first level. depth: its strided levels.
    loss: "hinge" (Lim and Ye, arXiv:1705.02894) or "non_saturating" (Goodfellow et al., arXiv:1406.2661).
    weight: of the generator's term, after it was brought to the size of the reconstruction's by the adaptive weight.
    max_adaptive_weight: bound of that factor.
    start_step: before it there is no adversary; a reconstruction that is still rough is too easily told from a clip.
    lecam: weight of the LeCam regularisation of the discriminator; it keeps training from few clips stable.
    lecam_decay: of the averages of logits that it needs.
    """

    discriminator: Dimensions = "3d"
    channels: int = 64
    depth: int = 3
    loss: GanLoss = "hinge"
    weight: float = 0.1
    max_adaptive_weight: float = 1e4
    start_step: int = 10_000
    lecam: float = 0.005
    lecam_decay: float = 0.99

    def __post_init__(self) -> None:
        for name, choices in (("discriminator", get_args(Dimensions)), ("loss", get_args(GanLoss))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name in ("channels", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("weight", "max_adaptive_weight", "start_step", "lecam"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.lecam_decay <= 1:
            raise ValueError(f"lecam_decay must be from 0 to 1, got {self.lecam_decay}")


class PatchAdversary(Adversary):
    """A PatchDiscriminator and both sides' losses.

    Buffers:
        logit_means: averages over steps of the mean logit of clips, then of reconstructions.
        updates: the steps that they are of.
    """

    logit_means: Tensor
    updates: Tensor

    def __init__(self, settings: AdversarySettings) -> None:
        super().__init__()
        self.settings = settings
        self.discriminator = PatchDiscriminator(settings.discriminator, settings.channels, settings.depth)
        self.register_buffer("logit_means", torch.zeros(2))
        self.register_buffer("updates", torch.tensor(0))

    def generator_terms(
        self, pixels: Tensor, reconstruction: Tensor, last_layer: Tensor, reconstruction_loss: Tensor, step: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What the autoencoder adds to its loss, and the parts of it; nothing before the start.

        The discriminator gets no gradient from it. `last_layer` is the decoder's last weight; `reconstruction_loss`
        has the gradient there that the adversary's is scaled to.
        """
        if step < self.settings.start_step:
            return pixels.new_zeros(()), {}
        constants = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        logits = torch.func.functional_call(self.discriminator, constants, (reconstruction,)).float()
        loss = generator_loss(logits, self.settings.loss)
        scale = adaptive_weight(reconstruction_loss, loss, last_layer, self.settings.max_adaptive_weight)
        values = {"generator": loss.detach(), "adaptive_weight": scale}
        return self.settings.weight * scale * loss, values

    def discriminator_terms(self, pixels: Tensor, reconstruction: Tensor, step: int) -> DiscriminatorTerms | None:
        if step < self.settings.start_step:
            return None
        real = self.discriminator(pixels).float()
        fake = self.discriminator(reconstruction.detach()).float()
        loss = discriminator_loss(real, fake, self.settings.loss)
        values = {"real_logit": real.detach().mean(), "fake_logit": fake.detach().mean()}
        if self.settings.lecam:
            self._average(torch.stack([values["real_logit"], values["fake_logit"]]))
            regularisation = lecam_regularisation(real, fake, self.logit_means)
            values["lecam"] = regularisation.detach()
            loss = loss + self.settings.lecam * regularisation
        return DiscriminatorTerms(loss, values)

    @torch.no_grad()
    def _average(self, logit_means: Tensor) -> None:
        """A plain mean of the first steps, which 0 would bias, and of all ranks."""
        decay = torch.clamp(self.updates / (self.updates + 1), max=self.settings.lecam_decay)
        self.logit_means.lerp_(sum_over_ranks(logit_means.clone()) / world_size(), 1 - decay)
        self.updates.add_(1)


def generator_loss(fake: Tensor, loss: GanLoss) -> Tensor:
    """How far reconstructions are from being taken for real; a mean over logits."""
    distance: Tensor = -fake if loss == "hinge" else F.softplus(-fake)
    return distance.mean()


def discriminator_loss(real: Tensor, fake: Tensor, loss: GanLoss) -> Tensor:
    """How badly clips and reconstructions are told apart; a mean over logits and both kinds."""
    if loss == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def lecam_regularisation(real: Tensor, fake: Tensor, logit_means: Tensor) -> Tensor:
    """Squared distance of clips' logits from the average of reconstructions', and the other way round.

    Tseng et al., arXiv:2104.03310, equation 3. `logit_means` holds both averages, clips' first, as constants.
    """
    mean_of_real, mean_of_fake = logit_means.detach().unbind()
    return (real - mean_of_fake).square().mean() + (fake - mean_of_real).square().mean()


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: Tensor, largest: float) -> Tensor:
    """The ratio of two losses' gradient norms at the decoder's last layer. Esser et al., arXiv:2012.09841, eq. 7.

    1 where no gradient is asked for, such as in an evaluation.
    """
    if not torch.is_grad_enabled():
        return generator.new_ones(())
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, generator)]
    ratio: Tensor = norms[0] / (norms[1] + 1e-6)
    return ratio.clamp(0.0, largest)
