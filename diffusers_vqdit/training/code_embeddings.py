"""Where the embeddings of a new transformer's codes begin: at what the codes stand for."""

from collections.abc import Mapping
from typing import Any

import torch

from ..models.quantizers.residual import ResidualVectorQuantizer
from ..models.quantizers.vector import RETIRED
from ..models.segment_layers import CODES_STD
from ..models.transformer_vqdit import VQDiTTransformer2DModel


FROM_VECTORS = 0.9  # of the embeddings' variance; the rest tells codes apart whose vectors are alike


def tokenizers_of(parts: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tokenizer of each segment that has one among a pipeline's parts, or in its container of them."""
    container = parts["segment_tokenizers"]
    held = {**({} if container is None else container.parts), **parts}
    return {name: held[entry["tokenizer"]] for name, entry in entries.items() if entry.get("tokenizer") in held}


def code_vectors(tokenizer: Any) -> torch.Tensor | None:
    """The vectors (K, D) of the codes of a tokenizer of pictures or spectrograms; None of any other: those of texts
    tell tokens apart, and nothing of what they mean."""
    quantizer = getattr(getattr(tokenizer, "vq", tokenizer), "quantize", None)
    if quantizer is None or isinstance(quantizer, ResidualVectorQuantizer):
        return None
    codes = torch.arange(quantizer.num_codes, device=next(tokenizer.parameters()).device)
    return quantizer.lookup(codes).detach().float().cpu()


def start_embeddings(transformer: VQDiTTransformer2DModel, tokenizers: Mapping[str, Any]) -> None:
    """Draw a transformer's embeddings of codes near to one another where what they stand for is alike: random
    projections of the codes' vectors, with some noise, in the scale that embeddings begin with.

    What is learned of a code then holds for those like it, from the first step on.

    Args:
        tokenizers: by segment; [`code_vectors`] says whose codes have vectors.
    """
    for name, tokenizer in tokenizers.items():
        vectors = code_vectors(tokenizer) if name in transformer.code_embeddings else None
        if vectors is None:
            continue
        used = vectors.abs().amax(1) < RETIRED / 2  # codes out of use stand for nothing
        scaled = vectors[used] - vectors[used].mean(0)
        scaled = scaled / scaled.square().mean().sqrt().clamp_min(1e-12)
        rows, dim = torch.arange(len(vectors))[used], vectors.shape[1]
        weight = transformer.code_embeddings[name].weight.data
        # A table of its own for each codebook, which ends in the mask's row.
        for first in range(0, len(weight), transformer.config.segments[name]["vocab_size"] + 1):
            mixed = (FROM_VECTORS / dim) ** 0.5 * scaled @ torch.randn(dim, weight.shape[1])
            mixed += (1 - FROM_VECTORS) ** 0.5 * torch.randn_like(mixed)
            weight[first + rows] = (CODES_STD * mixed).to(weight)
