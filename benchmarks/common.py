"""What the benchmarks have in common: functions take turns, equality is looked at first, ceilings are of the same run.

Process CPU time stands beside wall time: on a machine that others use, too, it says more.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention_flops(query, key, value, *args, out_val=None, **kwargs):
    return sdpa_flop_count(query.shape, key.shape, value.shape)


_attention_flops._get_raw = True  # takes tensors, not shapes
# PyTorch counts those of GPUs only.
COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        function()
    return counter.get_total_flops()


def same(ours: Any, theirs: Any) -> str:
    """In words, how far a result is from the first one's."""
    if not isinstance(ours, torch.Tensor):
        return "not compared"
    if ours.shape != theirs.shape:
        return f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    if torch.equal(ours, theirs):
        return "equal"
    if ours.is_floating_point():
        return f"largest difference {(ours.float() - theirs.float()).abs().max():.1e}"
    return f"{100 * (ours != theirs).double().mean():.2g} % differ"


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of wall time and of the process's CPU time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def ceilings(device: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """What this device does at best: ``flops`` a second in a product of square matrices, and ``bytes`` a second read
    and written in a copy."""
    size, times = (1024, 1) if device == "cpu" else (8192, 20)  # on a GPU a small product is its launch
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    source = torch.randn(2**24, device=device)
    target = torch.empty_like(source)
    clock = int(device == "cpu")  # CPU time there
    product = min(timed(lambda: [a @ b for _ in range(times)])[clock] for _ in range(5)) / times
    copy = min(timed(lambda: [target.copy_(source) for _ in range(times)])[clock] for _ in range(5)) / times
    return {"flops": 2e3 * size**3 / product, "bytes": 8e3 * source.numel() / copy}


def compare(
    case: str,
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    device: str,
    flops: float = 0.0,
    read: float = 0.0,
    dtype: torch.dtype = torch.float32,
    difference: Callable[[Any, Any], str] = same,
) -> dict[str, Any]:
    """One case: all functions take turns for a number of rounds, the first being ours.

    Args:
        case: what is measured.
        functions: name -> what to call without arguments.
        rounds: turns of each; one more warms up and is compared.
        device: where the ceilings are measured.
        flops, read: operations and bytes that the case can't do without.
        dtype: of the ceiling's product.
        difference: says how far another's result is from ours.
    """
    results = {name: function() for name, function in functions.items()}
    ours = next(iter(functions))
    differences = {name: difference(results[ours], result) for name, result in results.items()}
    del results
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function))
    rates, clock = ceilings(device, dtype), int(device == "cpu")
    rows = []
    for name, pairs in times.items():
        wall, cpu = ([pair[index] for pair in pairs] for index in (0, 1))
        of_ours = [other[clock] / own[clock] for other, own in zip(pairs, times[ours], strict=True)]
        rows.append(
            {
                "name": name,
                "cpu_ms": statistics.median(cpu),
                "wall_ms": statistics.median(wall),
                "wall_ms_spread": [min(wall), max(wall)],
                "over_ours": statistics.median(of_ours),
                "over_ours_spread": [min(of_ours), max(of_ours)],
                "result": differences[name] if name != ours else "",
            }
        )
    floor = 1e3 * max(flops / rates["flops"], read / rates["bytes"])
    return {"case": case, "rounds": rounds, "floor_ms": floor, "ceilings": rates, "rows": rows}


def number(value: float) -> str:
    """Three digits."""
    return "0" if value == 0 else f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def table(case: dict[str, Any]) -> str:
    """A case as a Markdown table."""
    floor = f"; floor {number(case['floor_ms'])} ms" if case["floor_ms"] else ""
    lines = [
        f"**{case['case']}** (medians of {case['rounds']}{floor})",
        "",
        "| | CPU ms | wall ms (from, to) | over ours (from, to) | result |",
        "|---|---|---|---|---|",
    ]
    for row in case["rows"]:
        low, high = map(number, row["wall_ms_spread"])
        least, most = map(number, row["over_ours_spread"])
        lines.append(
            f"| {row['name']} | {number(row['cpu_ms'])} | {number(row['wall_ms'])} ({low}, {high}) | "
            f"{number(row['over_ours'])} ({least}, {most}) | {row['result']} |"
        )
    return "\n".join(lines) + "\n"
