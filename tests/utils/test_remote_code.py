"""The one file for people without the package."""

import ast
import importlib
import sys

import pytest
from diffusers.utils.dynamic_modules_utils import get_relative_imports

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.utils.remote_code import save_remote_code, self_contained_source


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package of modules given by name, and imports its class `A` of module ``a``."""

    def make(**modules):
        folder = tmp_path / "made_package"
        folder.mkdir()
        for name, source in {"__init__": "", **modules}.items():
            (folder / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module("made_package.a").A

    yield make
    for name in [n for n in sys.modules if n.split(".")[0] == "made_package"]:
        del sys.modules[name]


def test_the_file_needs_nothing_of_the_package(tmp_path):
    save_remote_code(VQDiTPipeline, tmp_path)
    assert get_relative_imports(tmp_path / "pipeline.py") == []
    tree = ast.parse((tmp_path / "pipeline.py").read_text())

    def imported(nodes):
        froms = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return {name.split(".")[0] for name in froms | whole}

    # What the package requires, and what these require. Of anything else, in functions too, diffusers would warn that
    # it isn't installed.
    everywhere = imported(list(ast.walk(tree)))
    required = {"torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "accelerate", "numpy", "PIL"}
    assert everywhere - set(sys.stdlib_module_names) <= required
    assert sum(isinstance(node, ast.ClassDef) and node.name == "VQDiTPipeline" for node in tree.body) == 1


COMPONENTS = "class A:\n    @classmethod\n    def _get_signature_types(cls):\n        return {'b': (B,)}\n"


def test_modules_stand_in_the_order_of_their_dependence(package):
    pipeline = package(
        a=f"from .b import B\nfrom .c import (\n    C,\n    D,\n)\n\n{COMPONENTS}",
        b="import math\nfrom .c import C\n\n\nclass B(C):\n    value = math.pi\n",
        c="import math\n\n\nclass C:\n    pass\n\n\nD = math.e\n",
    )
    source = self_contained_source(pipeline)
    assert source.index("class C") < source.index("class B") < source.index("class A")
    assert "for _component in [B]:" in source
    namespace = {}
    exec(source.split("# The components")[0], namespace)
    assert namespace["B"]().value == pytest.approx(3.14159, abs=1e-5)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"a": f"from .b import B\nx = 1\n{COMPONENTS}", "b": "x = 2\nclass B: pass\n"}, "'x' means"),
        (
            {"a": f"import math\nfrom .b import B\n{COMPONENTS}", "b": "import cmath as math\nclass B: pass\n"},
            "'math'",
        ),
        ({"a": f"from .b import B as C\n{COMPONENTS}", "b": "class B: pass\n"}, "as they are called there"),
        ({"a": f"def f():\n    from .b import B\n{COMPONENTS}", "b": "class B: pass\n"}, "top of the module"),
        ({"a": f"from . import b\n{COMPONENTS}", "b": "class B: pass\n"}, "import names from a module"),
    ],
)
def test_what_one_file_would_change_is_refused(package, modules, message):
    with pytest.raises(ValueError, match=message):
        self_contained_source(package(**modules))


def test_a_file_that_needs_no_other_stays_as_it_is(package):
    source = "import math\n\n\nclass A:\n    pass\n"
    assert self_contained_source(package(a=source)) == source
