"""What a checkpoint can do, as a table."""

from dataclasses import dataclass


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
