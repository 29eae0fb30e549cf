"""The nearest of 16,384 codes for 4,096 vectors: beside diffusers' `VectorQuantizer`, which takes all distances, and
vector-quantize-pytorch where it is installed (`pip install vector-quantize-pytorch`), which looks them up, too."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from diffusers_vqdit.models.quantizers.code_search import nearest_codes

from .common import compare


def measure(rounds: int, device: str) -> Iterator[dict[str, Any]]:
    for dim in (8, 256):
        vectors, codebook = torch.randn(4096, dim, device=device), torch.randn(16_384, dim, device=device)
        bias = -0.5 * codebook.square().sum(1)
        functions = {
            "ours": lambda z=vectors, c=codebook: nearest_codes(z, c),
            "diffusers: argmin of cdist": lambda z=vectors, c=codebook: torch.cdist(z, c).argmin(1),
            "argmax of 2^22 products at once": lambda z=vectors, c=codebook, b=bias: torch.cat(
                [torch.addmm(b, part, c.T).argmax(1) for part in z.split(2**22 // len(c))]
            ),
        }
        if find_spec("vector_quantize_pytorch") is not None:
            from vector_quantize_pytorch import VectorQuantize

            theirs = VectorQuantize(dim, len(codebook)).eval().to(device)
            theirs._codebook.embed.copy_(codebook[None])
            functions["vector-quantize-pytorch"] = lambda z=vectors, m=theirs: m(z[None])[1][0]
        flops = 2 * len(vectors) * codebook.numel()
        yield compare(f"nearest code, D = {dim}", functions, rounds=rounds, device=device, flops=flops)
