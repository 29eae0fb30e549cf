"""One query of a gallery's features at four sizes: the search in blocks, as without faiss, beside one product."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from diffusers_vqdit import GalleryIndex
from diffusers_vqdit.likelihood import gallery, retrieval

from .common import compare


def measure(rounds: int, device: str) -> Iterator[dict[str, Any]]:
    rank = retrieval.NUM_FEATURES
    query = torch.randn(1, rank)
    with patch.object(gallery, "find_spec", lambda name: None):
        for size in (1_000, 10_000, 100_000, 1_000_000):
            tensors = {
                "codes": torch.zeros(size, 1, dtype=torch.int16),
                "features": torch.randn(size, rank).half(),
                "bias": torch.randn(size),
                "basis": torch.zeros(rank, rank).half(),
            }
            index = GalleryIndex(segment="image", query="text", way="text->image", model="random", **tensors)
            functions = {
                "ours": lambda index=index: index.search(query, 20),
                "one matrix product": lambda index=index: (
                    torch.addmm(index.bias, query, index.features.float().T).topk(20).indices
                ),
            }
            read = 2.0 * index.features.numel()
            yield compare(f"one query of {size:,}", functions, rounds=rounds, device="cpu", read=read)
