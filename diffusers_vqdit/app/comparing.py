"""The tabs of the page that compare candidates: label, and find in a gallery."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from .abilities import IMAGES, TEXTS, Ability, Field, arguments_of
from .examples import Examples
from .running import MAX_CHARACTERS, MAX_ITEMS, read_lines, read_picture, reading_files
from .tabs import TaskPicker, given_component, read_value, run_on


MAX_FOUND = 24
KEPT = 3600  # seconds that a gallery's index is kept for its person


class _LabelPicker(TaskPicker):
    """A choice among the tasks that make labels, and those that choose among texts."""

    def __init__(self, labels: Sequence[Ability], texts: Sequence[Ability], names: Iterable[str]) -> None:
        super().__init__([*labels, *texts])
        self.zero_shot = {ability.task for ability in texts}
        self.task.choices = [
            (f"{title}, among names of your own" if task in self.zero_shot else title, task)
            for title, task in self.task.choices
        ]
        self.names = gr.Textbox(
            "\n".join(names),
            label="Names to choose among, one a line",
            lines=4,
            max_length=MAX_CHARACTERS,
            visible=not labels,
        )


def label_tab(model: Any, labels: Sequence[Ability], texts: Sequence[Ability], examples: Examples) -> None:
    """A tab that labels what is given: with the checkpoint's labels, or among texts."""
    with gr.Row():
        with gr.Column():
            captions = [caption for files in examples.files.values() for caption in files.values()]
            picker = _LabelPicker(labels, texts, dict.fromkeys(captions))
            button = gr.Button("Label", variant="primary")
        with gr.Column():
            label = gr.Label(label="Probabilities", num_top_classes=10)

    def run(data: dict) -> Iterator[Any]:
        ability, values = picker.ability(data), picker.values(data)
        names = None
        if ability.task in picker.zero_shot:
            names = read_lines("Names to choose among", data[picker.names], least=2)
        options = {"labels": names, "output": ability.generated[0].name}
        output = model.pipeline.classify(**arguments_of(values), **options)
        yield {label: dict(zip(output.names, output.probabilities[0].tolist(), strict=True))}

    def picked(task: str) -> list[Any]:
        return [*picker.shown(task, picker.fields, "given"), gr.update(visible=task in picker.zero_shot)]

    picker.task.change(picked, picker.task, [*picker.given.values(), picker.names], api_visibility="private")
    clicks = examples.show(picker)
    inputs = [picker.task, *picker.given.values(), picker.names]
    run_on([button.click, *(click.then for click in clicks)], run, inputs, [label], "Label")


def find_tab(model: Any, pairs: Sequence[tuple[Field, Field]], examples: Examples) -> None:
    """A tab that finds the items of a gallery that go best with a query."""
    by_name = {f"{items.name} by {query.name}": (items, query) for items, query in pairs}
    first = next(iter(by_name))
    fields = list({query.name: query for _, query in pairs}.values())
    with gr.Row():
        with gr.Column():
            choice = gr.Dropdown(list(by_name), value=first, label="Find", visible=len(pairs) > 1)
            of_pictures = pairs[0][0].kind == IMAGES
            pictures = gr.Gallery(
                label="Pictures to look in",
                type="filepath",
                columns=6,
                height=240,
                interactive=True,
                format="png",
                sources=["upload"],
                visible=of_pictures,
            )
            texts = gr.Textbox(
                "",
                label="Texts to look in, one a line",
                lines=6,
                max_length=MAX_CHARACTERS * 4,
                visible=not of_pictures,
            )
            queries = {field.name: given_component(field, field == pairs[0][1]) for field in fields}
            button = gr.Button("Find", variant="primary")
        with gr.Column():
            found = gr.Gallery(label="Found, best first", columns=4, height=440, visible=of_pictures, buttons=[])
            lines = gr.Textbox(label="Found, best first", lines=8, interactive=False, visible=not of_pictures)
    reading_files(pictures)
    kept = gr.State(time_to_live=KEPT)  # (what was indexed, its index)

    def run(data: dict) -> Iterator[Any]:
        items, query = by_name[data[choice]]
        value = read_value(query, data[queries[query.name]])
        if items.kind == IMAGES:
            paths = [path for path, _ in data[pictures] or []]
            if not 1 <= len(paths) <= MAX_ITEMS:
                raise ValueError(f"There are {len(paths)} pictures to look in; give 1 to {MAX_ITEMS}.")
            texts_given: list[str] = []
        else:
            paths, texts_given = [], read_lines("Texts to look in", data[texts])
        key = (data[choice], *paths, *texts_given)
        if data[kept] is None or data[kept][0] != key:
            values = [read_picture("Pictures to look in", path) for path in paths] or texts_given
            index = model.pipeline.index(**arguments_of({items.name: values}), query=query.name)
        else:
            index = data[kept][1]
        output = model.pipeline.retrieve(value, index, top_k=min(MAX_FOUND, len(index)))
        best = output.indices[0].tolist()
        shown = {kept: (key, index)}
        if items.kind == IMAGES:
            yield shown | {found: [paths[row] for row in best]}
        else:
            ranked = [f"{place}. {texts_given[row]}" for place, row in enumerate(best, 1)]
            yield shown | {lines: "\n".join(ranked)}

    def picked(name: str) -> list[Any]:
        items, query = by_name[name]
        of_pictures = items.kind == IMAGES
        return [
            *(gr.update(visible=shown) for shown in (of_pictures, not of_pictures, of_pictures, not of_pictures)),
            *(gr.update(visible=field == query) for field in fields),
        ]

    choice.change(picked, choice, [pictures, texts, found, lines, *queries.values()], api_visibility="private")
    inputs = [choice, pictures, texts, kept, *queries.values()]
    boxes = [queries[field.name] for field in fields if field.kind == TEXTS]
    events = [button.click, *(box.submit for box in boxes)]
    if of_pictures:
        # Pictures are looked for by one's caption where they can be.
        by_prompt = [name for name, (items, query) in by_name.items() if query.name == examples.prompt]
        shown = next((name for name in by_prompt if by_name[name][0].kind == IMAGES), first)
        query = by_name[shown][1]
        images = [Image.open(path).convert("RGB") for path in examples.files.get(IMAGES, {})]

        def entered(_: str, __: Image.Image, caption: str) -> list[Any]:
            return [shown, images, caption if query.name == examples.prompt else gr.skip()]

        outputs = [choice, pictures, queries[query.name]]
        events += [click.then for click in examples.show_files(IMAGES, entered, choice, outputs)]
    run_on(events, run, inputs, [found, lines, kept], "Find")
