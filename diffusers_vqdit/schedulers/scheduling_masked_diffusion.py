"""Absorbing-state (masked) discrete diffusion: masking, loss weights and sampling steps."""

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..utils.checkpoint_mixin import ComponentCheckpointMixin
from ..utils.checks import check_choice, check_integer, check_integers, check_number, shown
from .outputs import MaskedDiffusionEvent, MaskedDiffusionSchedulerOutput
from .samplers import (
    Generators,
    draw_masked,
    halton_order,
    highest,
    next_reveals,
    uniform,
    within_entropy_bound,
)


MAX_STEPS = 100_000
# Those whose setting says how many codes a step reveals.
ADAPTIVE_SAMPLERS = ("entropy_bound", "threshold")
# Logits are divided by the temperature in float32.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_temperature(name: str, value: float) -> float:
    """`value` as a float: 0, or from `MIN_TEMPERATURE` to `MAX_TEMPERATURE`."""
    value = check_number(name, value, 0, MAX_TEMPERATURE)
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"{name}={value} must be 0 or in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}]")
    return value


def check_tensor(name: str, value: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {shown(value)}")


class MaskedDiffusionScheduler(ComponentCheckpointMixin, SchedulerMixin, ConfigMixin):
    """Masked diffusion over codes in [0, K), K being the mask (Austin et al. 2021; Sahoo et al. 2024, MDLM).

    At time t in [0, 1] a code is still visible with probability alpha(t): all are at 0, none at 1. Each row of a
    batch is on its own: it draws from its own generator where a list is given, and what else is in the batch changes
    nothing.

    Args:
        masking: ``"cosine"``, share of masks sin(pi t / 2) (Chang et al. 2022, MaskGIT), or ``"linear"``, share t.
        sampler: which masked codes a step reveals.
            ``"ancestral"``: each on its own, with the probability of the exact reverse process;
            ``"confidence"``: those drawn with the largest probability, as many of a row's masked ones as the schedule
            says, at least one a step (MaskGIT);
            ``"halton"``: as many, in an order that spreads over the grid (Besnier et al. 2025);
            ``"entropy_bound"``: those the model is surest of, as many as `entropy_bound` allows (Ben-Hamu et al.
            2025): a row takes as many steps as it needs, and the last one reveals what is left;
            ``"threshold"``: those drawn with a probability above `threshold`, and at least as many of the likeliest as
            the schedule says: a row takes as many steps as it needs, and never more than the others (Wu et al. 2025,
            Fast-dLLM; as in diffusers' `BlockRefinementScheduler`).
        temperature: divides the logits; 0 takes the likeliest code.
        choice_temperature: weight of the Gumbel noise on the log-probabilities that ``"confidence"`` ranks; it falls
            with the share of masks.
        entropy_bound: gamma of ``"entropy_bound"``, in nats: the sum of the entropies of the codes that a step
            reveals, without the largest, is at most this. 0 reveals one code a step, and more only where the model is
            certain.
        threshold: of ``"threshold"``, in [0, 1]. 0 reveals all at once, 1 what the schedule says.
        remask: eta of ``"ancestral"``: the probability that a visible code is masked again in a step, capped so that
            the share of masks stays the schedule's (Wang et al. 2025, ReMDM). 0 never does.
        guidance_schedule: how the guidance scale rises while the masks become fewer, see [`guidance_scale_at`]:
            ``"constant"``, ``"linear"`` or ``"cosine"``.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        masking: str = "cosine",
        sampler: str = "confidence",
        temperature: float = 1.0,
        choice_temperature: float = 1.0,
        entropy_bound: float = 1.0,
        remask: float = 0.0,
        guidance_schedule: str = "constant",
        threshold: float = 0.9,
    ) -> None:
        check_choice("masking", masking, ("cosine", "linear"))
        check_choice("sampler", sampler, ("ancestral", "confidence", "halton", "entropy_bound", "threshold"))
        check_temperature("temperature", temperature)
        check_number("choice_temperature", choice_temperature, 0, MAX_TEMPERATURE)
        if entropy_bound != math.inf:  # all at once
            check_number("entropy_bound", entropy_bound, 0)
        check_number("threshold", threshold, 0, 1)
        check_number("remask", remask, 0, 1)
        if remask and sampler != "ancestral":
            raise ValueError(f"remask={remask!r} needs sampler='ancestral', got sampler={sampler!r}; use remask=0")
        check_choice("guidance_schedule", guidance_schedule, ("constant", "linear", "cosine"))
        self.num_inference_steps: int | None = None
        self.until_done = False  # whether a loop ends where nothing is masked: with "auto"
        self.timesteps: Any = None  # (n,), by set_timesteps

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

    def guidance_scale_at(self, mask_ratio: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """The guidance scale 1 + (g - 1) w(r) at the share r of masks: weak early, strong late.

        w is 1 (``"constant"``), 1 - r (``"linear"``, as in Chang et al. 2023, Muse) or (1 + cos(pi r)) / 2
        (``"cosine"``, as in Gao et al. 2023, MDT). Early codes thus come from the distribution itself, which keeps
        samples diverse, and late ones follow what is given. A scale of 1 stays 1.

        Args:
            mask_ratio: share (B,) of each row's codes that are masked, in [0, 1].
            guidance_scale: g.

        Returns:
            (B,), of mask_ratio's dtype.
        """
        if self.config.guidance_schedule == "constant":
            weight = torch.ones_like(mask_ratio)
        elif self.config.guidance_schedule == "linear":
            weight = 1.0 - mask_ratio
        else:
            weight = 0.5 * (1.0 + torch.cos(math.pi * mask_ratio))
        return 1.0 + (guidance_scale - 1.0) * weight

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
        mask_token_id = check_integer("mask_token_id", mask_token_id, 1)
        check_tensor("original_samples", original_samples)
        if original_samples.dtype not in _INTEGERS or original_samples.ndim != 2:
            raise ValueError(
                f"original_samples must be integer codes (B, N), got {original_samples.dtype} of shape "
                f"{tuple(original_samples.shape)}"
            )
        if not isinstance(timesteps, torch.Tensor) or timesteps.shape != original_samples.shape[:1]:
            got = tuple(timesteps.shape) if isinstance(timesteps, torch.Tensor) else repr(timesteps)
            raise ValueError(f"timesteps must be a tensor of shape ({len(original_samples)},), got {got}")
        if timesteps.is_complex() or timesteps.dtype == torch.bool:
            raise ValueError(f"timesteps must be numbers in [0, 1], got {timesteps.dtype}")
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

    def set_timesteps(
        self,
        num_inference_steps: int | str,
        device: str | torch.device | None = None,
        *,
        num_codes: int | None = None,
    ) -> None:
        """Times 1, 1 - 1/n, ..., 1/n; the last step goes to 0.

        With ``"auto"`` the setting of ``"threshold"`` or ``"entropy_bound"`` alone says how many codes a step reveals,
        and no schedule asks for more: of each row that has masks those above the threshold or within the bound, and at
        least one. A loop ends where nothing is masked, after `num_codes` steps at the latest.

        Args:
            num_inference_steps: n, or ``"auto"``.
            num_codes: with ``"auto"``: the most codes that a row of [`step`]'s has; there are as many times.

        Raises:
            ValueError: if `num_inference_steps` is no integer from 1 to `MAX_STEPS`, or is ``"auto"`` with another
                sampler or without `num_codes`.
        """
        self.until_done = self.check_steps(num_inference_steps) == "auto"
        number = check_integer("num_codes", num_codes, 1) if self.until_done else num_inference_steps
        self.num_inference_steps = steps = int(number)
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        self.timesteps = times.flip(0)[:-1].float().to(device)
        # The shares of masks with 0, ..., n steps left
        self._ratios = (times > 0).double() if self.until_done else self.mask_ratio(times)
        self._host_ratios = self._ratios.tolist()

    def check_steps(self, num_inference_steps: int | str, remedy: str = "") -> int | str:
        """`num_inference_steps`, if [`set_timesteps`] takes it; `remedy` is what else would do where it doesn't take
        ``"auto"``, for the message.

        Raises:
            ValueError: if it doesn't.
        """
        if not isinstance(num_inference_steps, str):
            return check_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
        check_choice("num_inference_steps", num_inference_steps, ("auto",))
        if self.config.sampler not in ADAPTIVE_SAMPLERS:
            raise ValueError(
                f"num_inference_steps='auto' needs one of the samplers {list(ADAPTIVE_SAMPLERS)}; the scheduler has "
                f"sampler={self.config.sampler!r}; {remedy}pass a number, or set "
                "pipe.scheduler = MaskedDiffusionScheduler.from_config(pipe.scheduler.config, sampler='threshold')"
            )
        return num_inference_steps

    def scale_model_input(self, sample: torch.LongTensor, timestep: torch.Tensor | None = None) -> torch.LongTensor:
        """Codes need no scaling; here for interchange with other schedulers."""
        return sample

    def _steps_left(self, timestep: torch.Tensor | float) -> int:
        """Steps from this time to 0, this one among them."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before sampling")
        if isinstance(timestep, torch.Tensor) and timestep.numel() != 1:
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}; it must be one of set_timesteps' times")
        time = timestep.item() if isinstance(timestep, torch.Tensor) else timestep
        steps = check_number("timestep", time) * self.num_inference_steps
        rounding = self.num_inference_steps * 2**-23  # of times in float32
        if abs(steps - round(steps)) > 1e-3 + rounding or not 1 <= round(steps) <= self.num_inference_steps:
            raise ValueError(
                f"timestep={float(time)} must be one of the {self.num_inference_steps} that set_timesteps made, "
                f"from 1 down to 1/{self.num_inference_steps}"
            )
        return round(steps)

    def next_event(
        self,
        timestep: torch.Tensor | float,
        masked: torch.BoolTensor,
        previous: MaskedDiffusionEvent | None = None,
        *,
        generator: Generators = None,
    ) -> MaskedDiffusionEvent:
        """What the model is needed for next: call it once for each of ``timesteps``, before the model and [`step`].

        The reveals of the ancestral sampler don't depend on the codes. So each row goes at once to its next step that
        reveals something, at a time of its own, and no call is spent on the others: at most as many as there are
        codes, however many steps there are. The samples have the distribution that [`step`] alone gives. The other
        samplers, and remasking, need the model at every step that has masks.

        ```py
        event = None
        for timestep in scheduler.timesteps:
            event = scheduler.next_event(timestep, sample == K, event)
            if event.needs_model:
                logits = model(sample, event.timesteps)
                sample = scheduler.step(logits, timestep, sample, revealed=event.revealed).prev_sample
        ```

        Args:
            timestep: one of ``timesteps``. No row is at a later one after it.
            masked: (B, N) bool, what is masked; of all segments where several are generated.
            previous: what this method returned last; None at the first step.
            generator: one, or one a row.

        Raises:
            ValueError: if [`set_timesteps`] was not called, `timestep` is none of its times, or masked does not fit.
        """
        steps = self._steps_left(timestep)
        check_tensor("masked", masked)
        if masked.dtype != torch.bool or masked.ndim != 2:
            raise ValueError(f"masked must be bool (B, N), got {masked.dtype} of shape {tuple(masked.shape)}")
        batch_size, device = len(masked), masked.device
        num_masked = masked.sum(1).cpu()  # the one wait for the device in a step
        rows = ((num_masked > 0) | (self.config.remask > 0)).nonzero()[:, 0]  # remasking goes on without masks
        if self.config.sampler == "ancestral" and not self.config.remask:
            left = torch.full((batch_size,), steps, device=device)
            if previous is not None:
                left = left.minimum(previous.steps_left)
            noise = uniform(masked.shape, generator, device)
            self._ratios = self._ratios.to(device)
            left, revealed = next_reveals(masked, noise, self._ratios, left)
            times = (left + 1).double() / self.num_inference_steps
            return MaskedDiffusionEvent(times.float(), len(rows) > 0, revealed, left, num_masked, rows)
        left = torch.full((batch_size,), steps - 1, device=device)
        if self.config.sampler in ADAPTIVE_SAMPLERS:
            # Rows take as many steps as they need: their times are those of their own shares of masks.
            times = self.time_of_mask_ratio(masked.double().mean(1))
        else:
            times = (left + 1).double() / self.num_inference_steps
        return MaskedDiffusionEvent(times.float(), len(rows) > 0, None, left, num_masked, rows)

    @torch.no_grad()
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.LongTensor,
        *,
        revealed: torch.BoolTensor | None = None,
        known: torch.BoolTensor | None = None,
        shape: tuple[int, ...] | None = None,
        temperature: float | None = None,
        generator: Generators = None,
        check_values: bool = True,
        return_dict: bool = True,
    ) -> MaskedDiffusionSchedulerOutput | tuple[torch.LongTensor, torch.LongTensor]:
        """Go from time t to the next one. A visible code never changes, unless it is masked again by `remask`.

        Args:
            model_output: logits (B, N, K).
            timestep: t, one of ``timesteps``.
            sample: codes (B, N) at t, K where masked.
            revealed: (B, N) bool, what to reveal of the masked codes, from [`next_event`]; None leaves it to the
                sampler.
            known: (B, N) bool, codes that were there from the start and that ``remask`` must leave alone; None is
                none.
            shape: the grid, such as (h, w), that the N codes are; None is (N,). Read by ``"halton"`` only.
            temperature: in place of the configured one.
            generator: one, or one a row.
            check_values: whether to look at the values of `sample` and `model_output`. That waits for the device: a
                loop whose codes come from here may check them where they enter, and logits at the end.

        Raises:
            ValueError: if [`set_timesteps`] was not called, `timestep` is none of its times, or shapes or codes don't
                fit, or `model_output` has NaN, infinity or rows of minus infinity.
        """
        temperature = self.config.temperature if temperature is None else temperature
        check_temperature("temperature", temperature)
        steps = self._steps_left(timestep)
        check_tensor("model_output", model_output)
        check_tensor("sample", sample)
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
        if check_values and sample.numel() and (sample.min() < 0 or sample.max() > mask_token_id):
            raise ValueError(f"sample must be in [0, {mask_token_id}], got {sample.min()} to {sample.max()}")
        for name, value in (("revealed", revealed), ("known", known)):
            if value is not None:
                check_tensor(name, value)
            if value is not None and (value.dtype != torch.bool or value.shape != sample.shape):
                raise ValueError(
                    f"{name} must be bool of shape {tuple(sample.shape)}, got {value.dtype} of shape "
                    f"{tuple(value.shape)}"
                )
        shape = tuple(check_integers("shape", shape, 1)) if shape is not None else tuple(sample.shape[1:])
        if math.prod(shape) != sample.shape[1]:
            raise ValueError(f"shape={tuple(shape)} must have {sample.shape[1]} cells, as many as sample has codes")
        next_ratio, ratio = self._host_ratios[steps - 1 : steps + 1]

        # 1. Draw every masked code. Both draws are made for all positions, so that a row's noise is its own.
        masked = sample == mask_token_id  # (B, N)
        code_noise = uniform(sample.shape, generator, sample.device)
        reveal_noise = uniform(sample.shape, generator, sample.device)
        by_entropy = self.config.sampler == "entropy_bound"
        codes, log_probabilities, entropies = draw_masked(
            model_output, masked, code_noise, temperature, entropy=by_entropy and revealed is None
        )
        if check_values and log_probabilities.isnan().any():
            raise ValueError(
                "model_output is not finite: it has NaN, infinity or no possible code where codes are masked"
            )
        original = torch.where(masked, codes, sample)

        # 2. Choose those to reveal
        if revealed is not None:
            revealed = masked & revealed
        elif self.config.sampler == "ancestral":
            # q(x_s | x_t, x_0) reveals a masked code with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)
            # (Wang et al. 2025; with sigma = 0 Sahoo et al. 2024).
            sigma = self._remask_probability(ratio, next_ratio)
            revealed = masked & (reveal_noise < 1.0 - (next_ratio - sigma * (1.0 - ratio)) / ratio)
        elif entropies is not None:  # by_entropy
            # At temperature 0 the entropies are those at 1: of one code they would not say how sure the model is.
            entropy = entropies.masked_fill(~masked, math.inf)
            revealed = within_entropy_bound(entropy, self.config.entropy_bound) if steps > 1 else masked
        else:
            if self.config.sampler == "halton":
                score = -halton_order(shape, sample.device).double()
            elif self.config.sampler == "threshold":
                score = log_probabilities
            else:
                gumbel = -torch.log(-torch.log(reveal_noise.clamp(1e-300, 1 - 1e-16)))
                score = log_probabilities + self.config.choice_temperature * next_ratio * gumbel
            score = torch.where(masked, score, -math.inf)
            # Of the codes that a row has masked, the share that the schedule masks next; at least one is revealed.
            # Rounded, for a floor taken anew at each step would drift below the schedule.
            count = masked.sum(1)
            kept = torch.round(count * (next_ratio / ratio)).long().minimum((count - 1).clamp_min(0))
            revealed = highest(score, count - kept)
            if self.config.sampler == "threshold":
                revealed = revealed | (score.exp() > self.config.threshold)
            revealed = masked & revealed
        previous = torch.where(revealed, original, sample)

        # 3. Mask visible codes again; the noise of the masked ones was used, that of the visible ones was not.
        if self.config.remask:
            remasked = ~masked & (reveal_noise < self._remask_probability(ratio, next_ratio))
            if known is not None:
                remasked &= ~known
            previous = previous.masked_fill(remasked, mask_token_id)
        if not return_dict:
            return previous, original
        return MaskedDiffusionSchedulerOutput(prev_sample=previous, pred_original_sample=original)

    def _remask_probability(self, ratio: float, next_ratio: float) -> float:
        """sigma = min(eta, (1 - alpha_s) / alpha_t), the max-capped schedule of Wang et al. 2025."""
        return min(self.config.remask, next_ratio / (1.0 - ratio)) if ratio < 1 else self.config.remask
