import ast
import importlib
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import BENCHMARKS, parse_args
from benchmarks.common import compare, same, table


def test_equality_is_told_in_words():
    ones = torch.ones(4)
    assert same(ones, ones.clone()) == "equal"
    assert same(ones, ones + 0.5) == "largest difference 5.0e-01"
    assert same(ones.long(), torch.tensor([1, 1, 1, 2])) == "25 % differ"
    assert same(ones, torch.ones(3)) == "shapes (4,) and (3,)"


def test_functions_take_turns_and_the_slower_one_has_the_larger_ratio():
    calls = []
    sizes = {"ours": 50, "theirs": 1000}

    def work(name):
        calls.append(name)
        return sum(torch.rand(size, size).mm(torch.rand(size, size)).sum() * 0 for size in [sizes[name]])

    functions = {name: lambda name=name: work(name) for name in sizes}
    case = compare("products", functions, rounds=3, device="cpu", flops=1e9)
    assert calls == ["ours", "theirs"] * 4
    ours, theirs = case["rows"]
    assert theirs["over_ours"] > 1 == ours["over_ours"] and theirs["result"] == "equal"
    assert case["floor_ms"] == pytest.approx(1e12 / case["ceilings"]["flops"])
    text = table(case)
    assert "| theirs |" in text and len({line.count("|") for line in text.splitlines()[2:]}) == 1


def test_every_benchmark_is_there_and_others_are_named(capsys):
    for name in BENCHMARKS:
        assert callable(importlib.import_module(f"benchmarks.{name}").measure)
    with pytest.raises(SystemExit):
        parse_args(["no_such"])
    assert "no_such" in capsys.readouterr().err


def test_all_scripts_share_the_parser_and_write_nowhere_near_their_sources():
    """Types with ranges, no abbreviated flags; what is written goes to outputs/ unless a flag says where."""
    root = Path(__file__).resolve().parents[2]
    for path in [*(root / "benchmarks").glob("*.py"), *(root / "examples").glob("*.py")]:
        source = path.read_text()
        assert "argparse.ArgumentParser(" not in source, path
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("add_argument"):
                continue
            options = {one.arg: ast.unparse(one.value) for one in node.keywords}
            assert options.get("type") not in ("int", "float"), f"{path}: {ast.unparse(node)}"
            if node.args and ast.unparse(node.args[0]).startswith("'--output_"):
                written = options.get("default", "Path('outputs/")
                assert written.startswith("Path('outputs/") and options["type"] == "output_path", path
