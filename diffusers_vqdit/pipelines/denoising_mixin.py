"""The sampling loop of a pipeline over codes."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..likelihood.bounds import constant_modulation
from ..models.layers import VQDiTPrefix
from ..schedulers.scheduling_masked_diffusion import MaskedDiffusionScheduler
from .check_inputs import FiniteChecks, codes_of_callback
from .guidance import Scales, guidance_steps, predict_event, scales_at


class DenoisingMixin:
    """The part of [`VQDiTPipeline`] that goes from masks to codes."""

    # The pipeline's
    transformer: Any
    scheduler: Any
    _num_timesteps: Any
    progress_bar: Callable[..., Any]
    _mask_token_id: Callable[[str], int]
    _interrupt: Any
    _guidance_scale: Any

    def _denoise_at_once(
        self, codes: dict[str, torch.LongTensor], prefix: VQDiTPrefix | None, steps: int | str, **options: Any
    ) -> tuple[dict[str, torch.LongTensor], dict[str, torch.LongTensor]]:
        """[`_denoise`] with a scheduler of the call's own, and its times on the host: reading one waits for no
        device."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, num_codes=max(value[0].numel() for value in codes.values()))
        self._num_timesteps = len(scheduler.timesteps)
        return self._denoise(codes, prefix, scheduler, **options)

    def _denoise(
        self,
        codes: dict[str, torch.LongTensor],
        prefix: VQDiTPrefix | None,
        scheduler: MaskedDiffusionScheduler,
        *,
        guidance_scale: Scales,
        temperature: float | None,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable | None,
        tensor_inputs: list[str],
    ) -> tuple[dict[str, torch.LongTensor], dict[str, torch.LongTensor]]:
        """Codes (B, *shape) after all steps, and each as it was predicted last, by segment."""
        masks = {name: self._mask_token_id(name) for name in codes}
        fixed = {name: (value != masks[name]).flatten(1) for name, value in codes.items()}
        sizes = [value.shape[1] for value in fixed.values()]
        predicted, event, checks = dict(codes), None, FiniteChecks("logits are")
        # A callback may change the codes and the weights.
        options = {"check_values": False, **constant_modulation(self.transformer, codes)} if callback is None else {}
        if (cache := self.transformer.new_cache()) is not None:
            options["cache"] = cache
        with self.progress_bar(total=len(scheduler.timesteps)) as progress_bar:
            for index, timestep in enumerate(scheduler.timesteps):
                if self._interrupt and event is not None:  # after one step everything is predicted
                    continue
                masked = torch.cat([(value == masks[name]).flatten(1) for name, value in codes.items()], 1)  # (B, N)
                event = scheduler.next_event(timestep, masked, event, generator=generator)
                if scheduler.until_done and not event.needs_model:
                    break
                if event.needs_model:
                    if cache is not None:
                        cache.keep(event.rows)
                    prefixes, steps = guidance_steps(prefix.names if prefix is not None else (), guidance_scale)
                    # A cache begins anew with guidance, which must not depend on the other rows.
                    scales = scales_at(scheduler, steps, event, masked, leave_out=cache is None)
                    logits, finite, parts = predict_event(
                        self.transformer, codes, event, prefix, prefixes, scales, **options
                    )
                    checks.add(finite, parts, guidance_scale)
                    revealed = [None] * len(sizes) if event.revealed is None else event.revealed.split(sizes, 1)
                    for (name, value), reveal in zip(codes.items(), revealed, strict=True):
                        step = scheduler.step(
                            logits[name],
                            timestep,
                            value.flatten(1),
                            revealed=reveal,
                            known=fixed[name],
                            shape=value.shape[1:],
                            temperature=temperature,
                            generator=generator,
                            check_values=False,
                        )
                        codes = codes | {name: step.prev_sample.view_as(value)}
                        predicted[name] = step.pred_original_sample.view_as(value)
                if callback is not None:
                    current = next(iter(codes.values())) if len(codes) == 1 else codes
                    inputs = {"latents": current} if "latents" in tensor_inputs else {}
                    codes = codes_of_callback(callback(self, index, timestep, inputs), codes)
                    guidance_scale = self._guidance_scale
                progress_bar.update()
        checks.read()
        return codes, predicted
