"""The flags of an image tokenizer's quantizer."""

import argparse
import math
from typing import Any

from ..models.image_vq import QUANTIZER_OPTIONS
from ..utils.arguments import integer, non_negative_number, positive_integer, positive_number


def add_quantizer_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of all quantizers, with the defaults of ``train_image_vq.py``."""
    group.add_argument("--num_vq_embeddings", type=positive_integer, default=1024)
    group.add_argument("--vq_embed_dim", type=positive_integer, default=8)
    group.add_argument("--quantizer_type", choices=list(QUANTIZER_OPTIONS), default="vq")
    group.add_argument("--num_quantizers", type=positive_integer, default=1, help="Residual codes a position, of rvq.")
    group.add_argument("--fsq_levels", type=integer(2), nargs="+", help="Of FSQ; they give the number of codes.")
    group.add_argument("--codebook_norm", choices=["none", "l2"], default="l2", help="Of vq, ibq and lfq (l2: BSQ).")
    group.add_argument("--codebook_update", choices=["gradient", "ema"], default="ema")
    group.add_argument("--codebook_init", choices=["uniform", "data", "kmeans"], default="kmeans")
    group.add_argument("--restart_threshold", type=non_negative_number, default=0.1)
    estimators = ["straight_through", "rotation"]
    group.add_argument("--gradient_estimator", choices=estimators, default=estimators[0], help="Of vq, rvq and simvq.")
    group.add_argument("--beta", type=non_negative_number, default=0.25, help="Weight of the commitment term.")
    group.add_argument("--entropy_weight", type=non_negative_number, default=0.0)
    group.add_argument("--entropy_temperature", type=positive_number, default=0.01)


def quantizer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `ImageVQModel` that the type of the quantizer takes."""
    # The codebook's own ema_decay keeps its default; --ema_decay is that of the weights.
    taken = [name for name in QUANTIZER_OPTIONS[args.quantizer_type] if name != "ema_decay"]
    options = {"quantizer_type": args.quantizer_type, **{name: getattr(args, name) for name in taken}}
    sizes = {"num_vq_embeddings": args.num_vq_embeddings, "vq_embed_dim": args.vq_embed_dim}
    if args.fsq_levels:
        sizes = {"num_vq_embeddings": math.prod(args.fsq_levels), "vq_embed_dim": len(args.fsq_levels)}
    elif args.quantizer_type == "lfq":
        sizes["num_vq_embeddings"] = 2**args.vq_embed_dim
    return {**options, **sizes}
