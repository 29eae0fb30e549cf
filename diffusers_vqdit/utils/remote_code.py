"""One file that holds a pipeline and all it needs of its package, for people without the package.

`DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)` fetches a single file,
``pipeline.py``, and no other code of the repository. It is made here from the package's own sources at save time.
"""

import ast
import importlib.util
import inspect
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin


REMOTE_CODE_FILE = "pipeline.py"

_HEADER = '''\
"""{name} without the package {package}: its modules in one file.

Made by {package} when the checkpoint was saved; not to be edited.

    pipe = DiffusionPipeline.from_pretrained(repository, custom_pipeline="pipeline", trust_remote_code=True)
"""
'''

# `DiffusionPipeline` looks a repository's components up as attributes of `diffusers`. An imported package has put its
# own classes there, which stay.
_FOOTER = """\

# {line}
# The components, where DiffusionPipeline.from_pretrained looks for them

if "{package}" not in sys.modules:
    for _component in [{components}]:
        setattr(diffusers, _component.__name__, _component)
"""


def self_contained_source(pipeline_class: type) -> str:
    """Source of one module that defines a pipeline class and all that it needs of its package.

    The modules that it imports relatively, and those that they do, stand in it in the order of their dependence, as
    they are but for these imports. A module without relative imports is self-contained as it is: the source of a
    class that was loaded from such a file is that file.

    Args:
        pipeline_class: a class defined at the top of a module of a package. Its components, the models and schedulers
            that its ``__init__`` names in its annotations, are made known to diffusers by the file.

    Raises:
        ValueError: if a relative import can't be dropped, as it stands in a function, gives another name or imports
            a module, or if two modules give one name to different things.
    """
    sources = _modules(pipeline_class.__module__)
    if len(sources) == 1:
        return next(iter(sources.values()))
    package = pipeline_class.__module__.split(".")[0]
    parts = [_HEADER.format(name=pipeline_class.__name__, package=package), "import sys\n\nimport diffusers\n"]
    owners: dict[str, tuple[str, str]] = {}
    for module, source in sources.items():
        tree = ast.parse(source)
        for name, meaning in _names(tree, module).items():
            known, owner = owners.setdefault(name, (meaning, module))
            if known != meaning:
                raise ValueError(
                    f"{name!r} means {known!r} in {owner} and {meaning!r} in {module}: rename one, as they share a "
                    "file for people without the package"
                )
        parts.append(f"\n# {'-' * 117}\n# {module}\n\n{_without_relative_imports(source, tree, module).strip()}\n")
    components = _components(pipeline_class, package)
    components += [name for name in _models(sources) if name not in components]
    parts.append(_FOOTER.format(line="-" * 117, package=package, components=", ".join(components)))
    return "\n".join(parts)


def save_remote_code(pipeline_class: type, folder: str | os.PathLike) -> None:
    """Write ``pipeline.py`` of a pipeline class into a folder."""
    (Path(folder) / REMOTE_CODE_FILE).write_text(self_contained_source(pipeline_class), encoding="utf-8")


def _modules(name: str) -> dict[str, str]:
    """Sources of a module and of the modules that it imports relatively, those first that others need."""
    sources: dict[str, str] = {}

    def visit(name: str) -> None:
        module = importlib.import_module(name)
        source = Path(inspect.getfile(module)).read_text(encoding="utf-8")
        for node in _relative_imports(ast.parse(source)):
            needed = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
            if needed not in sources:
                visit(needed)
        sources[name] = source

    visit(name)
    return sources


def _relative_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]


def _without_relative_imports(source: str, tree: ast.Module, module: str) -> str:
    lines: list[str | None] = [*source.splitlines()]
    for node in _relative_imports(tree):
        statement = f"{ast.unparse(node)!r} in {module}"
        if node not in tree.body:
            raise ValueError(f"{statement} must stand at the top of the module")
        if node.module is None or any(alias.asname or alias.name == "*" for alias in node.names):
            raise ValueError(f"{statement} must import names from a module, as they are called there")
        end = node.end_lineno or node.lineno
        lines[node.lineno - 1 : end] = [None] * (end - node.lineno + 1)
    return "\n".join(line for line in lines if line is not None)


def _names(tree: ast.Module, module: str) -> dict[str, str]:
    """What the names at the top of a module mean: what was imported, or that they are the module's own."""
    names = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                names[bound] = f"import {alias.name if alias.asname else bound}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                names[alias.asname or alias.name] = f"from {node.module} import {alias.name}"
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = module
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id: module for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def _components(pipeline_class: Any, package: str) -> list[str]:
    """Names of the classes of the package among the annotations of a pipeline's components."""
    types = [one for types in pipeline_class._get_signature_types().values() for one in types]
    return [one.__name__ for one in types if isinstance(one, type) and one.__module__.split(".")[0] == package]


def _models(modules: Collection[str]) -> list[str]:
    """Names of the models that modules define: a `MultiTokenizerModel` looks for its own by name, too."""
    every = [one for name in modules for one in vars(sys.modules[name]).values() if isinstance(one, type)]
    found = [one.__name__ for one in every if issubclass(one, ModelMixin) and one.__module__ in modules]
    return list(dict.fromkeys(found))
