"""Training a tokenizer against a discriminator: its flags, and what each of the two learns in a step."""

import argparse

import torch
from accelerate import Accelerator

from ..utils.arguments import non_negative_integer, non_negative_number, positive_integer, positive_number
from .image_losses import (
    ADVERSARIAL_LOSSES,
    LeCam,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from .optimization import unwrap
from .run import TrainingRun
from .setup import make_optimizer


# Arguments that must be as they were where a run is resumed.
ADVERSARIAL_IDENTITY = (
    *("adversarial_weight", "adversarial_loss", "adversarial_start", "discriminator_warmup"),
    *("lecam_weight", "discriminator_channels", "discriminator_layers"),
)


def add_adversarial_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the adversarial loss and of the discriminator."""
    group.add_argument("--adversarial_weight", type=non_negative_number, default=0.0)
    group.add_argument("--adversarial_loss", choices=ADVERSARIAL_LOSSES, default="hinge")
    group.add_argument("--adversarial_start", type=non_negative_integer, default=0, help="Step from which it counts.")
    group.add_argument(
        "--discriminator_warmup", type=non_negative_integer, default=0, help="Steps it is trained before that."
    )
    group.add_argument("--lecam_weight", type=non_negative_number, default=0.0)
    group.add_argument("--discriminator_channels", type=positive_integer, default=64)
    group.add_argument("--discriminator_layers", type=positive_integer, default=3)
    group.add_argument("--discriminator_learning_rate", type=positive_number, default=1e-4)
    group.add_argument("--discriminator_max_grad_norm", type=non_negative_number, default=1.0)


class Adversary:
    """A [`PatchDiscriminator`] with its optimizer and LeCam's averages, as the flags of [`add_adversarial_arguments`]
    say. To be made after the tokenizer was prepared, whose checkpoints it joins.

    Args:
        shape: of a picture, (C, H, W).

    Raises:
        ValueError: if that is too small for the discriminator.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, shape: tuple[int, int, int]) -> None:
        self.args, self.accelerator = args, accelerator
        discriminator = PatchDiscriminator(shape[0], args.discriminator_channels, args.discriminator_layers).train()
        try:
            discriminator(torch.zeros(1, *shape))
        except RuntimeError as error:
            raise ValueError(
                f"discriminator_layers={args.discriminator_layers} must be fewer, or the part of the data that a step "
                f"sees larger: it is {shape[1]} x {shape[2]} ({error})"
            ) from error
        self.discriminator, self.optimizer = accelerator.prepare(
            discriminator, make_optimizer(args, discriminator, args.discriminator_learning_rate)
        )
        self.lecam = LeCam().to(accelerator.device)

    @classmethod
    def wanted(
        cls, args: argparse.Namespace, accelerator: Accelerator, shape: tuple[int, int, int]
    ) -> "Adversary | None":
        """One, where ``--adversarial_weight`` asks for it."""
        return cls(args, accelerator, shape) if args.adversarial_weight > 0 else None

    def generator_loss(
        self, step: int, made: torch.Tensor, reconstruction: torch.Tensor, last_layer: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
        """The tokenizer's weighted loss for what it made, (B, C, H, W), 0 before it counts, and what is logged of it.

        Args:
            last_layer: of the decoder, for [`adaptive_weight`] by the `reconstruction` loss; without, the weight is
                that of the flag.
        """
        if step < self.args.adversarial_start:
            return 0.0, {}
        # Not through DistributedDataParallel, and without gradients of the discriminator's own.
        unwrap(self.discriminator).requires_grad_(False)
        with self.accelerator.autocast():
            logs = {"generator": generator_loss(unwrap(self.discriminator)(made), self.args.adversarial_loss)}
        unwrap(self.discriminator).requires_grad_(True)
        weight = self.args.adversarial_weight
        if last_layer is not None:
            scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
            logs["adaptive_weight"] = adaptive_weight(reconstruction, logs["generator"], last_layer, scale=scale)
            weight = weight * logs["adaptive_weight"]
        return weight * logs["generator"], logs

    def descend(self, run: TrainingRun, step: int, real: torch.Tensor, made: torch.Tensor) -> dict[str, torch.Tensor]:
        """The discriminator's own micro-batch: its gradients and, with a step's last one, its optimizer's step.

        It starts before it counts, so that its first advice is worth something.

        Returns:
            what is logged of it.
        """
        args = self.args
        if step < args.adversarial_start - args.discriminator_warmup:
            return {}
        real_logits, made_logits = self.discriminator(torch.cat([real, made.detach()])).chunk(2)
        loss = discriminator_loss(real_logits, made_logits, args.adversarial_loss)
        logs = {"discriminator": loss, "logits_real": real_logits.mean(), "logits_made": made_logits.mean()}
        if args.lecam_weight > 0:
            logs["lecam"] = self.lecam(real_logits, made_logits)
            loss = loss + args.lecam_weight * logs["lecam"]
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm, _ = run.optimizer_step(
                self.optimizer, self.discriminator.parameters(), loss, args.discriminator_max_grad_norm
            )
            logs["discriminator_gradient_norm"] = torch.tensor(norm, device=loss.device)
        self.optimizer.zero_grad()
        return logs
