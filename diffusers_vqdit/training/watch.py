"""What goes wrong while a run trains, told while it happens: once each, with what helps against it."""

import argparse
import logging
from collections import deque

import torch
from accelerate import Accelerator

from ..models.image_vq import QUANTIZER_OPTIONS
from ..models.quantizers import Quantizer, ResidualVectorQuantizer
from .metrics import expected_usage


logger = logging.getLogger(__name__)

SETTLING = 20  # steps at a run's start of which the use of codes says nothing
USAGE_STEPS, LOW_USAGE = 20, 0.05
CODES_A_WINDOW, DEAD_SHARE = 20, 2 / 3  # a code is expected so often in a window, in which so many lie unused
LOSS_STEPS, CLIPPED_STEPS = 200, 200


class TrainingWatch:
    """Looks at each step's figures and warns where they say that training goes wrong: a warning in the log, and
    ``warnings/{name}`` in the trackers at the step of it, once for each of ``usage``, ``dead_codes``, ``loss`` and
    ``clipping``.

    Args:
        args: of the script, by whose flags the warnings say what would help.
        quantizer: that is trained, where one is.
    """

    def __init__(
        self, accelerator: Accelerator, args: argparse.Namespace, *, quantizer: Quantizer | None = None
    ) -> None:
        self.accelerator, self.args = accelerator, args
        self.max_grad_norm = args.max_grad_norm
        self.num_codes = 1 if quantizer is None else quantizer.num_codes
        levels = len(quantizer) if isinstance(quantizer, ResidualVectorQuantizer) else 1
        self.told: set[str] = set()
        self._steps = self._clipped = self._low = self._seen = 0
        self._anew = True  # not resumed, where the loss may have fallen long ago
        self._used = torch.zeros(levels, self.num_codes, dtype=torch.bool)
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=LOSS_STEPS // 4)

    def look(
        self,
        step: int,
        loss: float,
        gradient_norm: float,
        codes: torch.Tensor | None = None,
        usage: float | None = None,
    ) -> None:
        """Take in what an optimizer step gave.

        Args:
            step: from 1; a run whose first is a later one was resumed.
            loss: that training lowers, without what a discriminator adds.
            gradient_norm: before clipping.
            codes: of this process's last micro-batch, (...), or (..., q).
            usage: share of the codebook that this micro-batch used on all processes, the mean of all levels.
        """
        self._steps += 1
        if self._steps == 1:
            self._anew = step == 1
        if self._anew:
            self._look_at_loss(step, loss)
        clipped = 0 < self.max_grad_norm < gradient_norm
        self._clipped = self._clipped + 1 if clipped else 0
        if self._clipped == CLIPPED_STEPS:
            self._tell(
                step,
                "clipping",
                f"the gradients were clipped at each of the last {CLIPPED_STEPS} steps, now from a norm of "
                f"{gradient_norm:.3g} to {self.max_grad_norm:g}: the step's size is the clipping's. Lower "
                "--learning_rate, or raise --max_grad_norm",
            )
        if codes is not None and usage is not None and self._steps > SETTLING:
            self._look_at_codes(step, codes, usage)

    def _look_at_loss(self, step: int, loss: float) -> None:
        if len(self._first) < LOSS_STEPS // 10:
            self._first.append(loss)
        self._last.append(loss)
        if self._steps != LOSS_STEPS:
            return
        first, last = sum(self._first) / len(self._first), sum(self._last) / len(self._last)
        if not last < 0.98 * first:  # not a number is no less than anything
            self._tell(
                step,
                "loss",
                f"the loss has not fallen in {LOSS_STEPS} steps: it was {first:.4g} at first and is {last:.4g}. If "
                "the model wasn't trained before, try another --learning_rate, and look at the data",
            )

    def _look_at_codes(self, step: int, codes: torch.Tensor, usage: float) -> None:
        vectors = codes.numel() // len(self._used)
        shown = expected_usage(self.num_codes, vectors * self.accelerator.num_processes)
        self._low = self._low + 1 if usage < LOW_USAGE * shown else 0
        if self._low == USAGE_STEPS:
            self._tell(
                step,
                "usage",
                f"the last {USAGE_STEPS} batches used less than {100 * LOW_USAGE:g} % of the codes that they could "
                f"show, now {100 * usage:.2g} % of the codebook: it collapses. Lower --learning_rate{self._keepers()}",
            )
        # Codes that this process has seen in a window; those of the others would be more of the same.
        for level, used in zip(codes.cpu().reshape(vectors, -1).unbind(1), self._used, strict=True):
            used[level] = True
        self._seen += vectors
        if self._seen >= CODES_A_WINDOW * self.num_codes:
            dead = 1.0 - self._used.float().mean().item()
            if dead > DEAD_SHARE:
                self._tell(
                    step,
                    "dead_codes",
                    f"{100 * dead:.0f} % of the codes were not used once in the last {self._seen} positions. "
                    f"{self._revivers()}",
                )
            self._used.zero_()
            self._seen = 0

    def _takes(self, flag: str) -> bool:
        """Whether the script has a flag, and what it trains takes it: a pretrained model is as it is."""
        if getattr(self.args, "pretrained_model_name_or_path", None) is not None:
            return False
        kind = getattr(self.args, "quantizer_type", "vq")
        known = any(flag in options for options in QUANTIZER_OPTIONS.values())
        return hasattr(self.args, flag) and (not known or flag in QUANTIZER_OPTIONS[kind])

    def _keepers(self) -> str:
        """What else keeps codes in use than a lower learning rate, of what the run doesn't have already."""
        wanted = {"codebook_update": "ema", "codebook_init": "kmeans"}
        flags = [f"--{name} {value}" for name, value in wanted.items() if self._takes(name)]
        flags = [flag for flag in flags if getattr(self.args, flag.split()[0][2:]) != flag.split()[1]]
        if self._takes("restart_threshold") and self.args.restart_threshold == 0:
            flags.append("--restart_threshold 0.1")
        if not self._takes("restart_threshold") and self._takes("entropy_weight") and not self.args.entropy_weight:
            flags.append("--entropy_weight 0.1")
        return f", or train with {' '.join(flags)}" if flags else ""

    def _revivers(self) -> str:
        if getattr(self.args, "pretrained_model_name_or_path", None) is not None:
            return "Lower --learning_rate"
        restart = "Raise --restart_threshold, or make" if self._takes("restart_threshold") else "Make"
        sizes = ("num_codes", "num_vq_embeddings")
        size = "fsq_levels" if getattr(self.args, "fsq_levels", None) else next(filter(self._takes, sizes), None)
        size = "vq_embed_dim" if getattr(self.args, "quantizer_type", "") == "lfq" else size
        return f"{restart} fewer codes (--{size})" if size else f"{restart} fewer codes"

    def _tell(self, step: int, name: str, text: str) -> None:
        if name in self.told:
            return
        self.told.add(name)
        if self.accelerator.is_main_process:
            logger.warning(f"step {step}: {text}")
        self.accelerator.log({f"warnings/{name}": 1.0}, step=step)
