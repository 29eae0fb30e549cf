"""What to try on the page: prompts and pictures that come with a checkpoint."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image

from .abilities import IMAGES, LABELS, TEXTS, Ability, Field


MAX_EXAMPLES = 6  # of a task, or pictures
QUIETLY: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Examples:
    """Examples of values.

    Args:
        prompt: the segment that a prompt is of.
        texts: by segment, or by task where other texts suit it.
        pictures: files with their captions.
    """

    prompt: str
    texts: dict[str, list[str]] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, prompt: str) -> "Examples":
        """Those of a checkpoint's folder or repository: texts in ``examples/prompts.json``, or else the prompts of the
        ``widget`` in its card; and the pictures of ``examples/captions.json``, with their captions."""
        folder = Path(name)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(name, allow_patterns=["README.md", "examples/*"]))
            except Exception:  # of the Hub or the connection: a page is useful without examples
                return cls(prompt)
        files = [folder / "examples" / name for name in ("prompts.json", "captions.json")]
        texts, captions = (json.loads(one.read_text(encoding="utf-8")) if one.is_file() else {} for one in files)
        card = folder / "README.md"
        if not texts and card.is_file():
            widget = ModelCard.load(card).data.get("widget") or []
            texts = {prompt: [one["text"] for one in widget if isinstance(one, dict) and "text" in one]}
        return cls(prompt, texts, {str(files[1].parent / name): caption for name, caption in captions.items()})

    def show(self, picker: Any) -> list[Any]:
        """Show examples of what is given for a tab's tasks: texts and labels, and below them pictures.

        Args:
            picker: the tab's [`~tabs.TaskPicker`].

        Returns:
            the events of clicks that have entered an example.
        """
        rows = [row for ability in picker.abilities.values() for row in self._rows(ability)]
        components, events = [picker.task, *picker.given.values()], []
        if rows:

            def enter(index: int) -> list[Any]:
                ability, values = rows[index]
                return [ability.task, *(values.get(one.name, gr.skip()) for one in picker.fields)]

            chips = gr.Dataset(
                label="Examples",
                components=["textbox"],
                samples=[[", ".join(values.values())] for _, values in rows],
                type="index",
                samples_per_page=3 * MAX_EXAMPLES,
            )
            events.append(chips.click(enter, chips, components, **QUIETLY))
        takers = [ability for ability in picker.abilities.values() if ability.gives(IMAGES)]
        if takers:

            def fits(task: str, picture: Image.Image, caption: str) -> list[Any]:
                ability = picker.abilities[task]
                ability = ability if ability in takers else takers[0]
                values = {one.name: picture for one in ability.given if one.kind == IMAGES} | {self.prompt: caption}
                return [ability.task, *(values.get(one.name, gr.skip()) for one in picker.fields)]

            events += self.show_pictures(fits, picker.task, components)
        return events

    def show_pictures(self, enter: Callable[..., list[Any]], task: Any, components: list[Any]) -> list[Any]:
        """Show pictures; `enter` makes the values of components of the task's, a picture and its caption."""
        if not self.pictures:
            return []
        shown = list(self.pictures.items())[:MAX_EXAMPLES]

        def clicked(index: int, task: str) -> list[Any]:
            path, caption = shown[index]
            return enter(task, Image.open(path).convert("RGB"), caption)

        thumbnails = gr.Dataset(
            label="Pictures", components=[gr.Image(visible=False)], samples=[[path] for path, _ in shown], type="index"
        )
        return [thumbnails.click(clicked, [thumbnails, task], components, **QUIETLY)]

    def _rows(self, ability: Ability) -> list[tuple[Ability, dict[str, str]]]:
        """Values of what is given for a task, if that is texts and labels alone."""
        if not all(one.kind in (TEXTS, LABELS) for one in ability.given):
            return []
        names, columns = [one.name for one in ability.given], [self._values(ability, one) for one in ability.given]
        rows = list(zip(*columns, strict=False))[:MAX_EXAMPLES]  # none where nothing is given
        return [(ability, dict(zip(names, row, strict=True))) for row in rows]

    def _values(self, ability: Ability, given: Field) -> Sequence[str]:
        if given.kind == LABELS:
            return given.choices[:: max(1, len(given.choices) // 3)][:3]
        return self.texts.get(ability.task) or self.texts.get(given.name, [])
