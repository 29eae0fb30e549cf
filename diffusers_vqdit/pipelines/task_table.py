"""What a checkpoint can do, as a table, and as calls to try."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..tasks import Task
from .segment_base import ARGUMENTS, SegmentProcessor


# What stands for a given value of each kind, in examples; {} is the segment's name.
_EXAMPLES = {"texts": '"a {}"', "images": 'load_image("{}.png")', "audios": '"{}.wav"'}
_MOST_CALLS = 3


@dataclass
class TaskRow:
    """A task of a checkpoint.

    Args:
        task: the arrow.
        num_inference_steps: steps of the sampler by default.
        guidance_scale: of classifier-free guidance by default.
        call: what to pass.
    """

    task: str
    num_inference_steps: int
    guidance_scale: float
    call: str


class TaskTable(list[TaskRow]):
    """The tasks of a checkpoint, shown as a table."""

    def __repr__(self) -> str:
        rows = [("task", "steps", "guidance", "what to pass")]
        rows += [(row.task, str(row.num_inference_steps), f"{row.guidance_scale:g}", row.call) for row in self]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def call_of(task: Task, segments: Mapping[str, SegmentProcessor], values: Mapping[str, str]) -> str:
    """The call that asks for a task, in Python.

    Args:
        segments: the pipeline's.
        values: what stands for the values of given segments; for others it is ``...``.
    """
    shown = dict.fromkeys(task.given, "...") | dict(values)
    given = [segments[name] for name in task.given]
    arguments = [f"{one.argument}={shown[one.name]}" for one in given if one.argument in ARGUMENTS]
    others = ", ".join(f'"{one.name}": {shown[one.name]}' for one in given if one.argument not in ARGUMENTS)
    arguments += [f"inputs={{{others}}}"] if others else []
    output = f'output="{"+".join(task.generated)}"'
    return f"pipe({', '.join([*arguments, output])})"


def example_calls(
    tasks: Iterable[str], segments: Mapping[str, SegmentProcessor], labels: Sequence[str] | None
) -> list[str]:
    """Calls for the first of these tasks that make one value of known ones, in Python."""
    kinds = {name: one.kind for name, one in segments.items()}
    values = {name: _EXAMPLES[kind].format(name) for name, kind in kinds.items() if kind in _EXAMPLES}
    for label in list(labels or [])[:1]:
        named = (name for name, one in segments.items() if one.argument == "class_labels")
        values |= dict.fromkeys(named, json.dumps(label, ensure_ascii=False))
    calls = []
    for task in map(Task.parse, tasks):
        made = segments[task.generated[0]].output_field
        if made and len(task.generated) == 1 and set(task.given) <= set(values):
            calls.append(f"{call_of(task, segments, values)}.{made}[0]")
    return calls[:_MOST_CALLS]


# The Hub's names of tasks, by what is given and what is generated.
_HUB_TASKS = {
    ("images", "images"): "image-to-image",
    ("images", "texts"): "image-to-text",
    ("images", "labels"): "image-classification",
    ("texts", "texts"): "text-generation",
    ("texts", "labels"): "text-classification",
    ("texts", "audios"): "text-to-speech",
    ("audios", "texts"): "automatic-speech-recognition",
    ("audios", "labels"): "audio-classification",
    ("audios", "audios"): "audio-to-audio",
}


def hub_task_of(tasks: Iterable[str], kinds: Mapping[str, str]) -> str:
    """The Hub's name of what a pipeline does first of all: to draw, from texts unless it knows pictures alone.

    Args:
        kinds: the field of the output, such as ``"images"``, by segment.
    """
    pairs = {
        (given, generated)
        for task in map(Task.parse, tasks)
        for given in {kinds[name] for name in task.given} or {""}
        for generated in {kinds[name] for name in task.generated}
    }
    draws = {given for given, generated in pairs if generated == "images"}
    if not pairs or draws - {"images", ""} or draws == {""}:
        return "text-to-image"
    if draws:
        return _HUB_TASKS["images", "images"]
    return next((name for pair, name in _HUB_TASKS.items() if pair in pairs), "text-generation")
