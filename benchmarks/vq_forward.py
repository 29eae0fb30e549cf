"""Encoding and decoding at 256 pixels with aMUSEd's tokenizer (146 M weights, random): beside diffusers' `VQModel`.

Both as they are loaded, and both in the layout that convolutions on CPUs like best, which is the user's to choose:
``model.to(memory_format=torch.channels_last)``. In half precision ours takes it unasked. On a CPU without units for
bfloat16 that precision is measured at 64 pixels: at 256 the peer takes minutes for one.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import VQModel

from diffusers_vqdit import ImageVQModel

from .common import compare


CONFIG = {
    "block_out_channels": (128, 256, 256, 512, 768),
    "down_block_types": ("DownEncoderBlock2D",) * 5,
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "latent_channels": 64,
    "layers_per_block": 2,
    "mid_block_add_attention": False,
    "num_vq_embeddings": 8192,
}


def encode(model: VQModel, sample: torch.Tensor) -> torch.Tensor:
    return model.encode(sample).latents


def decode(model: VQModel, latents: torch.Tensor) -> torch.Tensor:
    return model.decode(latents, force_not_quantize=True).sample


def measure(rounds: int, device: str) -> Iterator[dict[str, Any]]:
    stock = VQModel(**CONFIG).eval().to(device)
    ours = ImageVQModel(**CONFIG).eval().to(device)
    ours.load_state_dict(stock.state_dict())
    has_units = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for dtype in (torch.float32, torch.bfloat16):
        models = {"ours": ours.to(dtype), "diffusers: VQModel": stock.to(dtype)}
        for name in list(models):
            models[f"{name}, channels_last"] = copy.deepcopy(models[name]).to(memory_format=torch.channels_last)
        side = 256 if dtype == torch.float32 or has_units else 64
        sample = torch.rand(1, 3, side, side, device=device, dtype=dtype) * 2 - 1
        latents = ours.encode(sample).latents
        encoders = {name: partial(encode, model, sample) for name, model in models.items()}
        decoders = {name: partial(decode, model, latents) for name, model in models.items()}
        for what, functions in (("encode", encoders), ("decode", decoders)):
            case = f"{what}, {side} px, {str(dtype).removeprefix('torch.')}"
            yield compare(case, functions, rounds=max(1, rounds // 2), device=device, dtype=dtype)
