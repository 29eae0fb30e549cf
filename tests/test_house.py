"""The rooms of the house: who may import whom, what stands in code, how long it may be, and its types."""

import ast
import configparser
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusers_vqdit"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
SCRIPTS = sorted((ROOT / "training").glob("*.py"))

# Each room may import itself and those of lower rank.
RANKS = {"version": 0, "utils": 1, "tasks": 1, "interop": 2, "models": 3, "schedulers": 3, "likelihood": 4}
RANKS |= {"pipelines": 5, "training": 6, "app": 6, "scripts": 7}
# Modules that are run with python -m, and the package itself, which gives out names of all rooms.
COMMANDS = {"__init__", "__main__", "interop.convert"}
# The old name of VQDiTTransformer2DModel.from_original gives out a model.
ROOT_IMPORTS = {"interop.dit"}

# The names of segments, and where one may stand.
NAMES = {"image", "text", "label", "image_lowres"}
NAMED = {
    "pipelines.segment_base": "the public arguments and the names that old checkpoints have",
    "pipelines.segment_processors": "the table of modalities",
    "pipelines.label_segment": "the modality's own word in messages",
    "pipelines.text_segment": "the modality's own word in messages",
    "pipelines.states_segment": "the modality's own word in messages",
    "pipelines.latent_inputs_mixin": "a public argument in a message",
    "utils.images": "a public argument in a message",
    "utils.provenance": "an attribute of Pillow's pictures",
    "app.examples": "a key of the Hub's cards",
    "training.image_folder": "a column, as datasets' image folders call it",
    "training.folder_tables": "a column, as datasets' folders of files call it",
}


# Files of tests below tests/<room>/ that are of several modules together, and of what.
CROSSING = {
    "app.browser": "the whole page, in a browser",
    "app.screenshots": "the whole page, as the docs show it",
    "app.sound": "the page of a pipeline that speaks and listens",
    "interop.interop": "every converter beside the code that it converts from",
    "models.centered_positions": "centered positions in layers, segment_layers, config_checks and the transformer",
    "models.quantizers.quantizers": "laws of all quantizers",
    "models.states": "states of encoders in segment_layers, config_checks and the transformer",
    "pipelines.buckets": "aspect ratios, from the pipeline's call to the transformer's positions",
    "pipelines.classify": "classify() and retrieve() of pipelines, over likelihood",
    "pipelines.exactness_laws": "laws of sampling, from the call to prefixes and the scheduler's events",
    "pipelines.exchanged_components": "components set to others, in both pipelines",
    "pipelines.pipeline_sampling": "samplers and settings of the scheduler as a pipeline's call meets them",
    "pipelines.pipeline_tasks": "repainting, repairing, filling in, enlarging: several mixins and segments",
    "pipelines.reading": "how both pipelines read pictures, are made of parts, and load LoRAs",
    "pipelines.residual_codes": "residual codes from data to pictures",
    "pipelines.threads": "both pipelines in several threads",
    "schedulers.auto": "numbers of steps that the scheduler chooses, with and without a pipeline",
    "training.audio_columns": "columns of sounds to folders of codes",
    "training.buckets": "aspect ratios from data to batches",
    "training.code_columns": "columns of ready codes through the scripts",
    "training.compile": "--compile of all training scripts",
    "training.data_scripts": "data of any kind through the scripts",
    "training.evaluation_of_states": "evaluation of pipelines of states and token ids, texts and scores",
    "training.flags": "the flags of all scripts",
    "training.output_paths": "--output_dir and its kind of all scripts",
    "training.pairs": "pictures from pictures through the scripts",
    "training.processes": "runs on several processes",
    "training.run_scripts": "runs that are stopped, damaged and resumed, by the scripts",
    "training.scripts": "the scripts as a user runs them",
    "training.streaming_scripts": "--streaming of all training scripts",
    "training.texts": "texts of any length, from columns to a pipeline",
}


def room(module: str) -> str:
    return "scripts" if module in COMMANDS else module.split(".")[0]


def imports(module: str, tree: ast.Module) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in it, by names in the package; "" is the package."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".") if package else []
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            names = [name if name in MODULES or name.split(".")[0] in MODULES and not base else base for name in names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            names = [name.removeprefix("diffusers_vqdit").strip(".") for name in names if _ours(name)]
        elif isinstance(node, ast.Import):
            names = [alias.name.removeprefix("diffusers_vqdit.") for alias in node.names if _ours(alias.name)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if isinstance(node.args[0], ast.Constant) and _ours(node.args[0].value):
                names = [node.args[0].value.removeprefix("diffusers_vqdit").strip(".")]
        yield from names


def _ours(name: str) -> bool:
    return name.split(".")[0] == "diffusers_vqdit"


def test_rooms_import_only_what_comes_before_them():
    found = set()
    for module, path in MODULES.items():
        if module in COMMANDS:
            continue
        own = room(module)
        for name in imports(module, ast.parse(path.read_text())):
            other = name.split(".")[0]
            if not name:
                found |= set() if module in ROOT_IMPORTS else {f"{module} imports the whole package"}
            elif other != own and RANKS[other] >= RANKS[own]:
                found.add(f"{module} imports {name}")
    assert not found


def test_no_script_is_imported():
    names = {path.stem for path in SCRIPTS}
    for path in [*MODULES.values(), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not names.intersection(modules), path


def test_nothing_is_loose_at_the_root():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "tasks", "version"}
    assert {name.split(".")[0] for name in MODULES} - COMMANDS == set(RANKS) - {"scripts"}


def misplaced(files: Iterable[str]) -> set[str]:
    """Of files of tests such as ``"utils.hub"`` for ``tests/utils/test_hub.py``, those of no module of their room, and
    of no script in that of training, that aren't told in [`CROSSING`] to be of several."""
    known = MODULES.keys() | {f"training.{path.stem}" for path in SCRIPTS}
    return {file for file in files if file.split(".")[0] in RANKS and file not in known | CROSSING.keys()}


def test_tests_are_laid_out_as_the_package_is():
    folder = ROOT / "tests"
    paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("test_*.py")]
    files = {".".join([*path.parts[:-1], path.name.removeprefix("test_")]) for path in paths}
    assert not misplaced(files)
    assert CROSSING.keys() <= files - MODULES.keys() and all(CROSSING.values())  # neither gone, nor of one module
    assert misplaced({"training.hub", "utils.text_vq", "models.train_text_vq", "hub.space", "utils.hub"}) == {
        "training.hub",
        "utils.text_vq",
        "models.train_text_vq",
    }


def docstring(node: ast.AST) -> ast.Expr | None:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    first = node.body[0] if isinstance(node, documented) and node.body else None
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return first if text else None


def test_segments_are_named_by_the_table_and_the_public_arguments_alone():
    found = set()
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        words = {id(first.value) for node in ast.walk(tree) if (first := docstring(node))}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in words and node.value in NAMES:
                found.add(module)
    assert found == set(NAMED)


@pytest.mark.parametrize("folder", ["diffusers_vqdit", "training", "benchmarks", "examples"])
def test_modules_and_functions_are_read_in_one_sitting(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        source = path.read_text()
        assert len(source.splitlines()) <= 450, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = docstring(node)
                lines = node.end_lineno - node.lineno - (first.end_lineno - first.lineno + 1 if first else 0)
                assert lines < 120, f"{path}: {node.name}"


def code_below_imports(path: Path) -> list[str]:
    """The lines of a script, but for what every one begins and ends with."""
    source = path.read_text()
    tree = ast.parse(source)
    first = 1 + max(node.end_lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    last = next(node.lineno for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))
    return [line.strip() for line in source.splitlines()[first - 1 : last - 1] if line.strip()]


@pytest.mark.parametrize("pair", itertools.combinations(SCRIPTS, 2), ids=lambda pair: "-".join(p.stem for p in pair))
def test_no_two_scripts_have_six_lines_in_common(pair):
    runs = [{tuple(lines[i : i + 6]) for i in range(len(lines) - 5)} for lines in map(code_below_imports, pair)]
    assert not runs[0] & runs[1]


def test_complexity_is_bounded():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "C901" in config["select"] and config["mccabe"]["max-complexity"] <= 20


def test_types_are_right():
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    assert not [one for one in overrides if one.get("ignore_errors")]
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tools_and_pythons_are_the_same_everywhere():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert f"rev: v{pinned['ruff']}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    extra = {re.match(r"[\w-]+", line)[0] for line in metadata["options.extras_require"]["test"].split()}
    assert {name.replace("_", "-") for name in extra} <= {name.replace("_", "-") for name in pinned}
    versions = re.findall(r":: (3\.\d+)", metadata["metadata"]["classifiers"])
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert f"python: {str(versions)}".replace("'", '"') in workflow
    assert metadata["options"]["python_requires"] == f">={versions[0]}"
