"""Diffusers' own shared tests, run on our classes.

They are taken from a checkout of diffusers, which ``DIFFUSERS_CHECKOUT`` names, and nothing here runs without one:

    DIFFUSERS_CHECKOUT=~/diffusers python -m pytest tests/conformance
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest


# Why diffusers skips what runs on a CPU as well.
ON_CPU = ("test requires a hardware accelerator", "test requires accelerator with training support")

collect_ignore_glob = []

if "DIFFUSERS_CHECKOUT" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    # As a package of its own name: theirs is called "tests", as ours is.
    folder = Path(os.environ["DIFFUSERS_CHECKOUT"]).expanduser() / "tests"
    spec = importlib.util.spec_from_file_location(
        "diffusers_tests", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["diffusers_tests"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["diffusers_tests"])


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Run on the CPU what diffusers runs on accelerators only, where a class says ``on_cpu``."""
    for item in items:
        if getattr(item.cls, "on_cpu", False):
            for node in item.listchain():
                node.own_markers = [mark for mark in node.own_markers if mark.kwargs.get("reason") not in ON_CPU]
