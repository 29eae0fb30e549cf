"""The files of an evaluation: each task's figures as soon as they are measured, which a run that goes on takes."""

import argparse
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..utils.arguments import font_file, output_path
from ..utils.weight_files import replacing_file
from ..version import __version__
from .checkpoints import plain_config
from .data_identity import rows_fingerprint
from .encoding import tokenizer_fingerprints
from .evaluation import EmojiData
from .evaluation_report import as_table


logger = logging.getLogger(__name__)

UNFINISHED_FILE = ".unfinished-evaluation.json"  # in the output folder, until the run has ended
# Arguments that change no figure.
_CONVENIENCES = ("tasks", "font", "output_dir")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of how and where figures are shown."""
    parser.add_argument("--font", type=font_file, help="Font file for the picture; Chinese needs one that has it.")
    parser.add_argument("--output_dir", type=output_path, help="By default the pipeline's, in outputs for the Hub's.")


def report_folder(args: argparse.Namespace) -> Path:
    """``--output_dir``, by default the pipeline's folder; a folder in ``outputs`` for one of the Hub, as a folder of
    its name would be taken for it from then on."""
    name = args.pretrained_model_name_or_path
    return args.output_dir or (Path(name) if Path(name).is_dir() else Path("outputs", name.replace("/", "--")))


def write_report(folder: Path, name: str, report: dict[str, dict]) -> None:
    """Write the figures of all tasks as ``{name}.json`` and as a table, ``{name}.md``."""
    for file, text in ((f"{name}.json", json.dumps(report, indent=2)), (f"{name}.md", as_table(report) + "\n")):
        with replacing_file(folder / file) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def evaluation_identity(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> str:
    """SHA-256 of all that figures are of: the pipeline, the data, the judge and the options of ``evaluate.py``."""
    judge = None if data.judge is None else data.judge.backbone
    parts = [
        __version__,
        plain_config(pipeline),
        tokenizer_fingerprints({**pipeline.components, "judge": judge}),
        [rows_fingerprint(split, split.column_names, times=True) for split in data.splits],
        {name: value for name, value in vars(args).items() if name not in _CONVENIENCES},
    ]
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()


def measure_tasks(folder: Path, identity: str, measures: Mapping[str, Callable[[], dict]]) -> dict[str, dict]:
    """The figures of all tasks that have some. Those that are there are in ``evaluation.json`` and ``.md`` after each.

    Figures that a run of the same identity has measured before it was killed are taken, until `UNFINISHED_FILE` is
    removed, which the caller does at its end.

    Args:
        identity: what the figures are of, by [`evaluation_identity`].
        measures: by task, in the order of the report.
    """
    found = _read(folder / UNFINISHED_FILE, identity)
    if taken := [name for name in measures if name in found]:
        path = str(folder / UNFINISHED_FILE)
        logger.warning(f"{taken} were measured by a run that was killed; to measure them again, remove {path!r}")
    report: dict[str, dict] = {}
    for name, measure in measures.items():
        if name not in found:
            found[name] = measure()
            with replacing_file(folder / UNFINISHED_FILE) as unfinished:
                unfinished.write_text(json.dumps({"identity": identity, "figures": found}), encoding="utf-8")
        report |= {name: found[name]} if found[name] else {}
        write_report(folder, "evaluation", report)
    return report


def _read(path: Path, identity: str) -> dict[str, dict]:
    """The figures of a run of the same identity that was killed."""
    try:
        kept = json.loads(path.read_bytes())
        return kept["figures"] if kept["identity"] == identity else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
