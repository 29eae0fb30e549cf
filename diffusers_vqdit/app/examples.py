"""What to try on the page: prompts, pictures and sounds that come with a checkpoint."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image

from ..utils.sounds import is_sound_file
from .abilities import AUDIOS, IMAGES, LABELS, TEXTS, Ability, Field


MAX_EXAMPLES = 6  # of a task, or files of a kind
QUIETLY: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Examples:
    """Examples of values.

    Args:
        prompt: the segment that a prompt is of.
        texts: by segment, or by task where other texts suit it.
        files: pictures and sounds with their captions, by the field of a pipeline's output that such values are of.
    """

    prompt: str
    texts: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, prompt: str) -> "Examples":
        """Those of a checkpoint's folder or repository: texts in ``examples/prompts.json``, or else the prompts of the
        ``widget`` in its card; and the pictures and sounds of ``examples/captions.json``, with their captions."""
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
        found: dict[str, dict[str, str]] = {}
        for file, caption in captions.items():
            if PurePath(file).is_absolute() or ".." in PurePath(file).parts:  # what a page shows, everyone may read
                continue
            kind = AUDIOS if is_sound_file(file) else IMAGES
            found.setdefault(kind, {})[str(files[1].parent / file)] = caption
        return cls(prompt, texts, {kind: dict(list(some.items())[:MAX_EXAMPLES]) for kind, some in found.items()})

    def show(self, picker: Any) -> list[Any]:
        """Show examples of what is given for a tab's tasks: texts and labels, and below them pictures and sounds.

        Args:
            picker: the tab's [`~tabs.TaskPicker`].

        Returns:
            the events of clicks that have entered an example.
        """
        by_row: dict[tuple[tuple[str, str], ...], Ability] = {}  # several tasks may take the same
        for ability in picker.abilities.values():
            for values in self._rows(ability):
                by_row.setdefault(tuple(values.items()), ability)
        rows = [(ability, dict(row)) for row, ability in by_row.items()]
        components, events = [picker.task, *picker.given.values()], []
        if rows:

            def enter(index: int, task: str) -> list[Any]:
                ability, values = rows[index]
                if [one.name for one in picker.abilities[task].given] == list(values):
                    ability = picker.abilities[task]
                return [ability.task, *(values.get(one.name, gr.skip()) for one in picker.fields)]

            chips = gr.Dataset(
                label="Examples",
                components=["textbox"],
                samples=[[", ".join(values.values())] for _, values in rows],
                type="index",
                samples_per_page=3 * MAX_EXAMPLES,
            )
            events.append(chips.click(enter, [chips, picker.task], components, **QUIETLY))
        for kind in self.files:
            takers = [ability for ability in picker.abilities.values() if ability.gives(kind)]
            if takers:
                events += self.show_files(kind, self._enter_file(kind, picker, takers), picker.task, components)
        return events

    def _enter_file(self, kind: str, picker: Any, takers: Sequence[Ability]) -> Callable[..., list[Any]]:
        """What enters a file and its caption for the task, or for the first one that takes such files."""

        def enter(task: str, value: Any, caption: str) -> list[Any]:
            ability = picker.abilities[task]
            ability = ability if ability in takers else takers[0]
            values = {one.name: value for one in ability.given if one.kind == kind} | {self.prompt: caption}
            return [ability.task, *(values.get(one.name, gr.skip()) for one in picker.fields)]

        return enter

    def show_files(self, kind: str, enter: Callable[..., list[Any]], task: Any, components: list[Any]) -> list[Any]:
        """Show pictures, or sounds by their captions; `enter` makes the values of components of the task's, of what is
        in a file, and of its caption."""
        shown = list(self.files.get(kind, {}).items())
        if not shown:
            return []

        sounds = kind == AUDIOS

        def clicked(index: int, task: str) -> list[Any]:
            path, caption = shown[index]
            # Sounds are played as they are, from where the page may read.
            value = save_file_to_cache(path, files.GRADIO_CACHE) if sounds else Image.open(path).convert("RGB")
            return enter(task, value, caption)

        files = gr.Dataset(
            label="Sounds" if sounds else "Pictures",
            components=["textbox"] if sounds else [gr.Image(visible=False)],
            samples=[[caption if sounds else path] for path, caption in shown],
            type="index",
        )
        return [files.click(clicked, [files, task], components, **QUIETLY)]

    def _rows(self, ability: Ability) -> list[dict[str, str]]:
        """Values of what is given for a task, if that is texts and labels alone."""
        if not all(one.kind in (TEXTS, LABELS) for one in ability.given):
            return []
        names, columns = [one.name for one in ability.given], [self._values(ability, one) for one in ability.given]
        rows = list(zip(*columns, strict=False))[:MAX_EXAMPLES]  # none where nothing is given
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _values(self, ability: Ability, given: Field) -> Sequence[str]:
        if given.kind == LABELS:
            return given.choices[:: max(1, len(given.choices) // 3)][:3]
        return self.texts.get(ability.task) or self.texts.get(given.name, [])
