"""What a checkpoint can do, as a table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..tasks import Task


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
