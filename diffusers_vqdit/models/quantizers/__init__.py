"""Quantizers: vectors to codes and back, each trained in its own way."""

from .codebook import IndexBackpropagationQuantizer, SimVectorQuantizer
from .lookup_free import FiniteScalarQuantizer, LookupFreeQuantizer
from .residual import ResidualVectorQuantizer
from .vector import Quantizer, QuantizerOutput, VectorQuantizer


__all__ = [
    "FiniteScalarQuantizer",
    "IndexBackpropagationQuantizer",
    "LookupFreeQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "ResidualVectorQuantizer",
    "SimVectorQuantizer",
    "VectorQuantizer",
]
