"""Absorbing-state (masked) discrete diffusion: masking, loss weights and sampling steps."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from ..hub.checkpoint_mixin import CheckpointMixin


Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class MaskedDiffusionSchedulerOutput(BaseOutput):
    """Output of [`MaskedDiffusionScheduler.step`].

    Args:
        prev_sample (`torch.LongTensor` of shape `(B, N)`): codes at the next, smaller time; K where still masked.
        pred_original_sample (`torch.LongTensor` of shape `(B, N)`): codes with every masked one drawn.
    """

    prev_sample: torch.LongTensor
    pred_original_sample: torch.LongTensor


class MaskedDiffusionScheduler(CheckpointMixin, SchedulerMixin, ConfigMixin):
    """Masked diffusion over codes in [0, K), K being the mask (Austin et al. 2021; Sahoo et al. 2024, MDLM).

    At time t in [0, 1] a code is still visible with probability alpha(t): all are at 0, none at 1. Each row of a
    batch is on its own: it draws from its own generator where a list is given, and what else is in the batch changes
    nothing.

    Args:
        masking: ``"cosine"``, share of masks sin(pi t / 2) (Chang et al. 2022, MaskGIT), or ``"linear"``, share t.
        sampler: ``"ancestral"`` reveals each masked code on its own, with the probability of the exact reverse
            process; ``"confidence"`` reveals the codes drawn with the largest probability, as many of a row's masked
            ones as the schedule says, at least one a step (MaskGIT).
        temperature: divides the logits; 0 takes the likeliest code.
        choice_temperature: weight of the Gumbel noise on the log-probabilities that ``"confidence"`` ranks; it falls
            with the share of masks.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        masking: str = "cosine",
        sampler: str = "confidence",
        temperature: float = 1.0,
        choice_temperature: float = 1.0,
    ) -> None:
        if masking not in ("cosine", "linear"):
            raise ValueError(f"masking={masking!r} must be 'cosine' or 'linear'")
        if sampler not in ("ancestral", "confidence"):
            raise ValueError(f"sampler={sampler!r} must be 'ancestral' or 'confidence'")
        if temperature < 0 or choice_temperature < 0:
            raise ValueError(
                f"temperature={temperature} and choice_temperature={choice_temperature} must not be negative"
            )
        self.num_inference_steps: int | None = None
        self.timesteps: torch.Tensor | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # The schedule: pure functions of the time

    def mask_ratio(self, t: torch.Tensor) -> torch.Tensor:
        """Probability 1 - alpha(t) that a code is masked at time t."""
        return torch.sin(0.5 * math.pi * t) if self.config.masking == "cosine" else t

    def time_of_mask_ratio(self, ratio: torch.Tensor) -> torch.Tensor:
        """The time at which a code is masked with this probability: the inverse of [`mask_ratio`]."""
        return torch.asin(ratio) / (0.5 * math.pi) if self.config.masking == "cosine" else ratio

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Probability that a code is visible at time t: 1 at 0, 0 at 1."""
        return 1.0 - self.mask_ratio(t)

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The derivative of alpha at time t."""
        if self.config.masking == "cosine":
            return -0.5 * math.pi * torch.cos(0.5 * math.pi * t)
        return -torch.ones_like(t)

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Weight -alpha'(t) / (1 - alpha(t)) of a masked code's cross-entropy in the NELBO (Sahoo et al. 2024, eq.
        10), for t in (0, 1]: it grows without bound towards 0, where nothing is masked."""
        return -self.d_alpha(t) / self.mask_ratio(t)

    # -----------------------------------------------------------------------------------------------------------------
    # Forward process

    def add_noise(
        self,
        original_samples: torch.LongTensor,
        timesteps: torch.Tensor,
        *,
        mask_token_id: int,
        generator: Generators = None,
    ) -> torch.LongTensor:
        """Mask each code with probability 1 - alpha(t), independently.

        Args:
            original_samples: codes (B, N) in [0, K).
            timesteps: times (B,) in [0, 1].
            mask_token_id: K.
            generator: one, or one a row.

        Raises:
            ValueError: for codes that are no integers or out of range, or times outside [0, 1].
        """
        if original_samples.is_floating_point() or original_samples.ndim != 2:
            raise ValueError(
                f"original_samples must be integer codes (B, N), got {original_samples.dtype} of shape "
                f"{tuple(original_samples.shape)}"
            )
        if not isinstance(timesteps, torch.Tensor) or timesteps.shape != original_samples.shape[:1]:
            got = tuple(timesteps.shape) if isinstance(timesteps, torch.Tensor) else repr(timesteps)
            raise ValueError(f"timesteps must be a tensor of shape ({len(original_samples)},), got {got}")
        if timesteps.numel() and not (timesteps.min() >= 0 and timesteps.max() <= 1):
            raise ValueError(f"timesteps must be in [0, 1], got {timesteps.min()} to {timesteps.max()}")
        if original_samples.numel() and (original_samples.min() < 0 or original_samples.max() >= mask_token_id):
            raise ValueError(
                f"original_samples must be in [0, {mask_token_id}), got values from {original_samples.min()} to "
                f"{original_samples.max()}"
            )
        ratio = self.mask_ratio(timesteps.double()).to(original_samples.device)
        masked = uniform(original_samples.shape, generator, original_samples.device) < ratio[:, None]
        return original_samples.masked_fill(masked, mask_token_id)

    # -----------------------------------------------------------------------------------------------------------------
    # Sampling

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Times 1, 1 - 1/n, ..., 1/n; the last step goes to 0."""
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps!r} must be an integer of at least 1")
        self.num_inference_steps = num_inference_steps
        steps = torch.arange(num_inference_steps, 0, -1, dtype=torch.float64)
        self.timesteps = (steps / num_inference_steps).float().to(device)

    def scale_model_input(self, sample: torch.LongTensor, timestep: torch.Tensor | None = None) -> torch.LongTensor:
        """Codes need no scaling; here for interchange with other schedulers."""
        return sample

    @torch.no_grad()
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.LongTensor,
        *,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> MaskedDiffusionSchedulerOutput | tuple[torch.LongTensor, torch.LongTensor]:
        """Go from time t to the next one. A visible code never changes.

        Args:
            model_output: logits (B, N, K).
            timestep: t, one of ``timesteps``.
            sample: codes (B, N) at t, K where masked.
            generator: one, or one a row.

        Raises:
            ValueError: if [`set_timesteps`] was not called, `timestep` is none of its times, or shapes or codes don't
                fit.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if model_output.ndim != 3 or sample.shape != model_output.shape[:2]:
            raise ValueError(
                f"model_output must be (B, N, K) and sample (B, N), got {tuple(model_output.shape)} and "
                f"{tuple(sample.shape)}"
            )
        if sample.dtype != torch.int64 or not model_output.is_floating_point():
            raise ValueError(
                f"sample must be int64 codes and model_output floating-point logits, got {sample.dtype} and "
                f"{model_output.dtype}"
            )
        mask_token_id = model_output.shape[-1]
        if sample.numel() and (sample.min() < 0 or sample.max() > mask_token_id):
            raise ValueError(f"sample must be in [0, {mask_token_id}], got {sample.min()} to {sample.max()}")
        steps = float(timestep) * self.num_inference_steps
        if abs(steps - round(steps)) > 1e-3 or not 1 <= round(steps) <= self.num_inference_steps:
            raise ValueError(
                f"timestep={float(timestep)} must be one of the {self.num_inference_steps} that set_timesteps made, "
                f"from 1 down to 1/{self.num_inference_steps}"
            )
        remaining = round(steps) - 1  # steps after this one
        times = torch.tensor([remaining, remaining + 1], dtype=torch.float64) / self.num_inference_steps
        next_ratio, ratio = self.mask_ratio(times).tolist()

        # 1. Draw every masked code. Both draws are made for all positions, so that a row's noise is its own.
        masked = sample == mask_token_id  # (B, N)
        code_noise = uniform(sample.shape, generator, sample.device)
        reveal_noise = uniform(sample.shape, generator, sample.device)
        logits = model_output[masked]  # (M, K)
        codes, log_probabilities = draw(logits, code_noise[masked], self.config.temperature)
        original = sample.masked_scatter(masked, codes)

        # 2. Choose those to reveal
        if self.config.sampler == "ancestral":
            # q(x_s | x_t, x_0) reveals a masked code with probability (alpha_s - alpha_t) / (1 - alpha_t).
            revealed = masked & (reveal_noise < 1.0 - next_ratio / ratio)
        else:
            gumbel = -torch.log(-torch.log(reveal_noise.clamp(1e-300, 1 - 1e-16)))
            confidence = torch.full(sample.shape, -math.inf, dtype=torch.float64, device=sample.device)
            confidence[masked] = log_probabilities
            confidence = confidence + self.config.choice_temperature * next_ratio * gumbel
            # Of the codes that a row has masked, the share that the schedule masks next; at least one is revealed.
            # Rounded, for a floor taken anew at each step would drift below the schedule.
            count = masked.sum(1)
            kept = torch.round(count * (next_ratio / ratio)).long().minimum((count - 1).clamp_min(0))
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            revealed = masked & (rank < (count - kept)[:, None])
        previous = torch.where(revealed, original, sample)
        if not return_dict:
            return previous, original
        return MaskedDiffusionSchedulerOutput(prev_sample=previous, pred_original_sample=original)


def uniform(shape: torch.Size, generator: Generators, device: torch.device) -> torch.Tensor:
    """Uniform float64 numbers; row i from generator i where there is a list.

    In float32 the smallest numbers are too coarse: Gumbel noise made of them lowers the temperature (Zheng et al.
    2024).
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"generator is a list of {len(generator)}, but there are {shape[0]} rows")
        return torch.stack([uniform(shape[1:], one, device) for one in generator])
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator={generator!r} must be a torch.Generator or a list of them, one a row")
    source = generator.device if generator is not None else device
    return torch.rand(shape, generator=generator, device=source, dtype=torch.float64).to(device)


def draw(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> tuple[torch.LongTensor, torch.Tensor]:
    """Codes (M,) from softmax(logits / temperature) by the inverse of the distribution function, and their
    log-probabilities.

    The inverse is looked up first among blocks of about sqrt(K) codes, then within one: only its codes are summed in
    float64.

    Args:
        logits: (M, K).
        noise: (M,) float64, uniform in [0, 1).
        temperature: 0 takes the largest logit.

    Returns:
        codes (M,) int64, and (M,) float64 log-probabilities at the temperature given (at 1 where that is 0).
    """
    logits = logits.float()
    probabilities = torch.softmax(logits / temperature if temperature not in (0, 1) else logits, dim=-1)  # (M, K)
    if temperature == 0:
        codes = logits.argmax(-1)
    else:
        size = logits.shape[-1]
        width = 1 << ((size - 1).bit_length() + 1) // 2
        blocks = F.pad(probabilities, (0, -size % width)).unflatten(-1, (-1, width))  # (M, blocks, width)
        cumulative = blocks.sum(-1).double().cumsum(-1)  # (M, blocks)
        target = noise[:, None] * cumulative[:, -1:]  # (M, 1)
        block = torch.searchsorted(cumulative, target, right=True)
        before = F.pad(cumulative, (1, 0)).gather(1, block)
        within = blocks.take_along_dim(block[..., None], 1)[:, 0].double().cumsum(-1)  # (M, width)
        # The two sums of a block differ by rounding: never look beyond the last code that is possible.
        rest = (target - before).minimum(within[:, -1:] * (1 - 2**-53))
        codes = (block * width + torch.searchsorted(within, rest, right=True))[:, 0]
    return codes, probabilities.gather(1, codes[:, None])[:, 0].double().log()
