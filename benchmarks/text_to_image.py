"""Text to image: the 32 px starter beside itself with guidance in two passes and with adaLN at each call, and models
of 256 codes, one or four a position, beside aMUSEd.

All large models have random weights and about as many of them, twelve guided steps and a batch of 1; neither text
encoder nor image tokenizer is timed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AmusedScheduler, UVit2DModel

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.models.layers import VQDiTModulation, VQDiTPrefix
from diffusers_vqdit.models.transformer_vqdit import VQDiTOutput

from .common import compare


CODES, SIDE, STEPS, TOKENS, GUIDANCE = 8192, 16, 12, 77, 6.0


def two_passes(transformer: Callable, codes: dict, prefix: VQDiTPrefix, **options) -> dict:
    """Logits with and without what is given, as `with_unconditional` makes them in one pass."""
    own = transformer(codes, prefix=prefix, **options).sample
    free = transformer(codes, **options).sample
    return {name: torch.cat([own[name], free[name]]) for name in own}


def large_model(device: str, **options: Any) -> VQDiTTransformer2DModel:
    """A text-to-image model of random weights; `options` are the image segment's."""
    segments = {
        "text": {"vocab_size": 512, "shape": [TOKENS]},
        "image": {"vocab_size": CODES, "shape": [SIDE, SIDE], **options},
    }
    model = VQDiTTransformer2DModel(num_attention_heads=8, attention_head_dim=64, num_layers=11, segments=segments)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().to(device)


def sample_ours(transformer: VQDiTTransformer2DModel, text: torch.Tensor, device: str, once: bool) -> torch.Tensor:
    scheduler = MaskedDiffusionScheduler()
    scheduler.set_timesteps(STEPS, device=device)
    generator = torch.Generator().manual_seed(0)
    prefix = transformer.encode_prefix({"text": text})
    codes = torch.full((1, SIDE, SIDE), CODES, device=device)
    options = {"modulation": transformer.encode_modulation({"image": codes}), "check_values": False}
    for timestep in scheduler.timesteps:
        if once:
            logits = transformer({"image": codes}, prefix=prefix, with_unconditional=True, **options).sample["image"]
        else:
            logits = two_passes(transformer, {"image": codes}, prefix, **options)["image"]
        conditional, free = logits.chunk(2)
        logits = torch.lerp(free, conditional, GUIDANCE)
        codes = scheduler.step(logits, timestep, codes.flatten(1), generator=generator).prev_sample.view_as(codes)
    return codes


def sample_amused(transformer: UVit2DModel, states: torch.Tensor, pooled: torch.Tensor, device: str) -> torch.Tensor:
    """The loop of diffusers' `AmusedPipeline`; states (2, S, D) and pooled (2, D), first without a prompt."""
    scheduler = AmusedScheduler(mask_token_id=CODES)
    scheduler.set_timesteps(STEPS, (2, 0), device)
    generator = torch.Generator().manual_seed(0)
    conditions = torch.tensor([[256, 256, 0, 0, 6]] * 2, device=device, dtype=states.dtype)
    codes = torch.full((1, SIDE, SIDE), CODES, device=device)
    for timestep in scheduler.timesteps:
        logits = transformer(
            codes.expand(2, -1, -1), micro_conds=conditions, pooled_text_emb=pooled, encoder_hidden_states=states
        )
        free, conditional = logits.chunk(2)
        logits = free + GUIDANCE * (conditional - free)
        codes = scheduler.step(logits, timestep, codes, generator=generator).prev_sample
    return codes


def measure(rounds: int, device: str) -> Iterator[dict[str, Any]]:
    pipe = VQDiTPipeline.from_pretrained("model_cards/vqdit-emoji-32").to(device)
    pipe.set_progress_bar_config(disable=True)
    forward = pipe.transformer.forward

    def in_two(codes: dict, prefix: VQDiTPrefix, with_unconditional: bool, **options) -> VQDiTOutput:
        if not with_unconditional:
            return forward(codes, prefix=prefix, **options)
        return VQDiTOutput(sample=two_passes(forward, codes, prefix, **options))

    def starter(function: Callable) -> torch.Tensor:
        with patch.object(pipe.transformer, "forward", function):
            return pipe("a red apple", generator=torch.Generator().manual_seed(0), output_type="pt").images

    def at_each_call(codes: dict, modulation: VQDiTModulation, **options) -> VQDiTOutput:
        return forward(codes, **options)

    functions = {
        "ours": partial(starter, forward),
        "ours, adaLN at each call": partial(starter, at_each_call),
        "ours, guidance in two passes": partial(starter, in_two),
    }
    yield compare("text->image, starter, guided, batch 1", functions, rounds=rounds, device=device)

    ours, four = large_model(device), large_model(device, patch=[2, 2])
    theirs = UVit2DModel(
        hidden_size=512,
        in_channels=512,
        block_out_channels=512,
        block_num_heads=8,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=1408,
        vocab_size=CODES + 64,
        codebook_size=CODES,
        sample_size=SIDE,
    )
    theirs = theirs.eval().to(device)
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (ours, four, theirs)]
    for dtype in (torch.float32, torch.bfloat16):
        text = torch.randint(512, (1, TOKENS), device=device)
        states = torch.randn(2, TOKENS, 768, device=device, dtype=dtype)
        pooled = torch.randn(2, 768, device=device, dtype=dtype)
        own, patched, other = ours.to(dtype), four.to(dtype), theirs.to(dtype)
        functions = {
            f"ours, {sizes[0]:.0f} M": partial(sample_ours, own, text, device, True),
            "ours, guidance in two passes": partial(sample_ours, own, text, device, False),
            f"ours, four codes a position, {sizes[1]:.0f} M": partial(sample_ours, patched, text, device, True),
            f"diffusers: aMUSEd, {sizes[2]:.0f} M": partial(sample_amused, other, states, pooled, device),
        }
        case = f"text->image, 256 codes, {STEPS} guided steps, {str(dtype).removeprefix('torch.')}"
        yield compare(
            case, functions, rounds=max(1, rounds // 2), device=device, dtype=dtype, difference=lambda a, b: ""
        )
