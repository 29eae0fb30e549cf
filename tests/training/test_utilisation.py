"""The share of a device's peak is that of the products of all steps but the first."""

import argparse

import pytest
import torch
from accelerate import Accelerator

from diffusers_vqdit.training import utilisation
from diffusers_vqdit.training.utilisation import Utilisation


def steps(monkeypatch, number, **arguments):
    """Forward and backward passes of 2 x 3 x 4 products, a second each."""
    clock = iter(range(100))
    monkeypatch.setattr(utilisation.time, "perf_counter", lambda: float(next(clock)))
    args = argparse.Namespace(**{"peak_tflops": 1e-12, "compile": False, **arguments})
    found = Utilisation(args, Accelerator())
    layer, sample = torch.nn.Linear(4, 3, bias=False), torch.randn(2, 4, requires_grad=True)
    for _ in range(number):
        with found.counting():
            layer(sample).sum().backward()
    return found


def test_products_forwards_and_backwards_are_counted_once(monkeypatch):
    found = steps(monkeypatch, 3)
    assert found.flops == 3 * 2 * 2 * 3 * 4  # forwards, for the weight and for the sample
    assert found.figures() == {"mfu": pytest.approx(found.flops * 2 / 1.0)}  # of a peak of one a second


@pytest.mark.parametrize("arguments", [{"peak_tflops": None}, {"compile": True}])
def test_without_a_peak_or_with_hidden_products_there_is_no_figure(monkeypatch, arguments):
    assert steps(monkeypatch, 3, **arguments).figures() == {}


def test_the_first_step_alone_says_nothing(monkeypatch):
    assert steps(monkeypatch, 1).figures() == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("NVIDIA L4", 121)],
)
def test_peaks_of_gpus_are_told_from_their_names(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    args = argparse.Namespace(peak_tflops=None)
    gpu = argparse.Namespace(device=torch.device("cuda"), mixed_precision="bf16")
    assert utilisation.peak_tflops(args, gpu) == peak
    gpu.mixed_precision = "no"
    assert utilisation.peak_tflops(args, gpu) is None
    assert utilisation.peak_tflops(argparse.Namespace(peak_tflops=3.0), gpu) == 3.0
