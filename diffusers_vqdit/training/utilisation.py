"""How much of a device's arithmetic a training uses."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode


# Dense products in half precision, in TFLOP/s, as the makers' data sheets have them; the longer names first.
PEAK_TFLOPS = {
    **{"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "B200": 2250, "A100": 312, "A800": 312},
    **{"L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165, "V100": 125, "T4": 65},
}


def peak_tflops(args: argparse.Namespace, accelerator: Accelerator) -> float | None:
    """``--peak_tflops``, or that of a known GPU in half precision; None where neither is there."""
    half = accelerator.mixed_precision in ("fp16", "bf16")
    if args.peak_tflops is not None or accelerator.device.type != "cuda" or not half:
        return args.peak_tflops
    name = torch.cuda.get_device_name(accelerator.device)
    return next((float(peak) for known, peak in PEAK_TFLOPS.items() if known in name), None)


class Utilisation:
    """The share of its peak that a device does in products and convolutions of the model (MFU, Chowdhery et al. 2022,
    PaLM, appendix B), over all steps since the first.

    They are counted once, forwards and backwards, on the first micro-batch; with gradient checkpointing what is
    computed twice counts twice. Compiled models hide theirs, and get no figure; nor do devices of unknown peak.

    Args:
        args: with `peak_tflops` and `compile`.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.peak = None if args.compile else peak_tflops(args, accelerator)
        self.flops: int | None = None
        self._passes, self._started = 0, 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """For the ``with`` block of each micro-batch."""
        if self.peak is None or self.flops is not None:
            yield
            self._passes += 1
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops, self._started = counter.get_total_flops(), time.perf_counter()

    def figures(self) -> dict[str, float]:
        """``mfu`` in [0, 1], for the trackers, or nothing."""
        if self.peak is None or self.flops is None or not self._passes:
            return {}
        return {"mfu": self.flops * self._passes / (time.perf_counter() - self._started) / (1e12 * self.peak)}
