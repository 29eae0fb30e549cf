"""A task is an arrow ``given->generated`` between segments, such as ``text->image`` or ``->image+text``."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


SEGMENT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Task:
    """An arrow from given segments to generated ones.

    A segment on neither side is absent. The order within a side has no meaning, so it is kept sorted and two tasks
    that say the same are equal.

    Args:
        given: names of the segments that are known.
        generated: names of the segments to generate, at least one.

    Raises:
        ValueError: if a name is no identifier or comes twice, or if nothing is generated.
    """

    given: tuple[str, ...]
    generated: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", tuple(sorted(self.given)))
        object.__setattr__(self, "generated", tuple(sorted(self.generated)))
        names = self.given + self.generated
        for name in names:
            if not SEGMENT_NAME.fullmatch(name):
                raise ValueError(f"task {self}: {name!r} is no segment name; use letters, digits and underscores")
            if names.count(name) > 1:
                raise ValueError(f"task {self}: segment {name!r} stands in it twice")
        if not self.generated:
            raise ValueError(f"task {self}: there is no segment to generate after '->'")

    @classmethod
    def parse(cls, text: str) -> "Task":
        """Read ``"text+image_lowres->image"``; spaces don't count, and an empty given side is allowed."""
        sides = text.split("->")
        if len(sides) != 2:
            raise ValueError(f"task {text!r} must have one '->', as in 'text->image' or '->image'")
        given, generated = (tuple(name.strip() for name in side.split("+")) if side.strip() else () for side in sides)
        return cls(given, generated)

    def __str__(self) -> str:
        return "+".join(self.given) + "->" + "+".join(self.generated)

    @property
    def segments(self) -> tuple[str, ...]:
        """All segments of the task, the given ones first."""
        return self.given + self.generated


def parse_tasks(text: str) -> list[tuple[Task, float]]:
    """Read a weighted list such as ``"text->image:4,image->text:2,->image"``; a weight left out is 1.

    Raises:
        ValueError: for a task that can't be read, a weight that isn't positive, or a task given twice.
    """
    tasks: list[tuple[Task, float]] = []
    for item in text.split(","):
        arrow, _, number = item.partition(":")
        try:
            weight = float(number) if number.strip() else 1.0
        except ValueError:
            weight = math.nan
        if not (0 < weight < math.inf):
            raise ValueError(f"tasks={text!r}: the weight {number!r} of {arrow.strip()!r} must be a positive number")
        task = Task.parse(arrow)
        if task in [known for known, _ in tasks]:
            raise ValueError(f"tasks={text!r}: {str(task)!r} stands in it twice")
        tasks.append((task, weight))
    return tasks


def canonical_task(task: Any) -> Any:
    """A task's string in the one form that is compared, spaces gone and names sorted; what is none as it is."""
    try:
        return str(Task.parse(task))
    except (ValueError, AttributeError):
        return task


def check_task(task: Task, known: Iterable[str]) -> None:
    """Raise a ValueError that lists the tasks a checkpoint knows when `task` is not one of them."""
    known = [str(Task.parse(arrow)) for arrow in known]
    if str(task) not in known:
        raise ValueError(f"this checkpoint was not trained for the task {str(task)!r}; it knows {', '.join(known)}")
