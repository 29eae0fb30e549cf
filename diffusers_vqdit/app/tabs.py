"""The tabs of the page that make something: draw, repaint, repair, enlarge, edit, caption, pairs, texts, sounds."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from ..utils.checks import check_integer, check_number
from .abilities import AUDIOS, IMAGES, LABELS, TEXTS, Ability, Field
from .examples import Examples
from .running import (
    MAX_CHARACTERS,
    read_picture,
    read_sound,
    read_text,
    reading_files,
    refusing,
    saved_files,
    steps_of,
)


MAX_SAMPLES, MAX_STEPS, MAX_GUIDANCE, MAX_SEED = 8, 256, 20.0, 2**31 - 1
QUEUE = {"concurrency_limit": 2, "concurrency_id": "model"}  # calls of the model at once; others wait
VERBS = {"Sound": "Run", "Pairs": "Make pairs", "Texts": "Write", "Caption": "Describe"}
BRUSH = "#d946ef"
SIDE = 512  # pixels of the longer side of a picture that is painted on


# ---------------------------------------------------------------------------------------------------------------------
# Components


def given_component(field: Field, visible: bool) -> Any:
    """What a value to be given is entered with."""
    label = field.name
    if field.kind == TEXTS:
        return gr.Textbox("", label=label, max_length=MAX_CHARACTERS, lines=1, visible=visible)
    if field.kind == LABELS:
        return gr.Dropdown(list(field.choices), value=field.choices[0], label=label, visible=visible)
    if field.kind == AUDIOS:
        return reading_files(
            gr.Audio(
                sources=["microphone", "upload"],
                type="filepath",
                label=label,
                buttons=["download"],
                visible=visible,
            )
        )
    return picture_component(label, visible)


def picture_component(label: str, visible: bool = True) -> Any:
    """A picture to be uploaded; small ones are shown large."""
    return reading_files(
        gr.Image(
            type="filepath",
            image_mode=None,
            format="png",
            label=label,
            height=280,
            elem_classes="fitted",
            visible=visible,
        )
    )


def generated_component(field: Field, visible: bool) -> Any:
    """What a value that comes out is shown in."""
    if field.kind == IMAGES:
        return gr.Gallery(
            label=field.name, columns=2, height=490, object_fit="contain", buttons=["download"], visible=visible
        )
    if field.kind == AUDIOS:
        return gr.Audio(label=field.name, interactive=False, buttons=["download"], visible=visible)
    return gr.Textbox(label=field.name, lines=2, interactive=False, buttons=["copy"], visible=visible)


def read_value(field: Field, value: Any) -> Any:
    """A value that is given, checked."""
    if field.kind == TEXTS:
        return read_text(field.name, value)
    if field.kind == LABELS:
        return field.choices.index(value)
    return read_sound(field.name, value) if field.kind == AUDIOS else read_picture(field.name, value, field.tile)


def union(sides: Iterable[Sequence[Field]]) -> list[Field]:
    """The fields of several abilities, each once."""
    return list({field.name: field for side in sides for field in side}.values())


class TaskPicker:
    """A choice of one of a tab's abilities, with what is given for it; what another needs is hidden.

    Args:
        abilities: at least one.
    """

    def __init__(self, abilities: Sequence[Ability]) -> None:
        self.abilities = {ability.task: ability for ability in abilities}
        first, self.fields = abilities[0], union(ability.given for ability in abilities)
        choices = [(ability.title, ability.task) for ability in abilities]
        self.task = gr.Dropdown(choices, value=first.task, label="Task", visible=len(choices) > 1)
        self.given = {field.name: given_component(field, field in first.given) for field in self.fields}

    def ability(self, data: dict) -> Ability:
        return self.abilities[data[self.task]]

    def values(self, data: dict) -> dict[str, Any]:
        """What is given for the chosen ability, by segment."""
        return {field.name: read_value(field, data[self.given[field.name]]) for field in self.ability(data).given}

    def shown(self, task: str, fields: Iterable[Field], side: str) -> list[Any]:
        """Updates of the visibility of components of fields."""
        return [gr.update(visible=field in getattr(self.abilities[task], side)) for field in fields]

    def description(self, values: dict[str, Any]) -> str:
        """What a picture was drawn from, for its file."""
        named = {field.name: field for field in self.fields}
        texts = [
            named[name].choices[value] if named[name].kind == LABELS else value
            for name, value in values.items()
            if name in named and named[name].kind in (TEXTS, LABELS)
        ]
        return "; ".join(texts)


class SamplingOptions:
    """Guidance, steps and seed of a tab."""

    def __init__(self, first: Ability, num_samples: int | None) -> None:
        self.samples = gr.Slider(1, MAX_SAMPLES, num_samples, step=1, label="How many") if num_samples else None
        with gr.Accordion("Options", open=False):
            guided = first.guidance_scale is not None
            self.guidance = gr.Slider(
                0, MAX_GUIDANCE, first.guidance_scale or 1.0, step=0.1, label="Guidance scale", visible=guided
            )
            steps = min(first.num_inference_steps, MAX_STEPS)
            self.steps = gr.Slider(1, MAX_STEPS, steps, step=1, label="Inference steps")
            self.seed = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed")
            self.new_seed = gr.Checkbox(True, label="A new seed each time")
        self.components = [one for one in (self.samples, self.guidance, self.steps, self.seed, self.new_seed) if one]

    def defaults(self, ability: Ability) -> list[Any]:
        """Updates of guidance and steps to what a task has by default."""
        guided = ability.guidance_scale is not None
        return [
            gr.update(value=ability.guidance_scale or 1.0, visible=guided),
            gr.update(value=min(ability.num_inference_steps, MAX_STEPS)),
        ]

    def read(self, data: dict, ability: Ability) -> tuple[dict[str, Any], int]:
        """The arguments of a pipeline's call, and the seed."""
        count = 1 if self.samples is None else check_integer("How many", data[self.samples], 1, MAX_SAMPLES)
        guidance_scale = check_number("Guidance scale", data[self.guidance], 0, MAX_GUIDANCE)
        seed = random.randint(0, MAX_SEED) if data[self.new_seed] else int(data[self.seed] or 0)
        options = {
            "num_inference_steps": check_integer("Inference steps", data[self.steps], 1, MAX_STEPS),
            "guidance_scale": None if ability.guidance_scale is None else guidance_scale,
            "num_images_per_prompt": count,
            "generator": [torch.Generator().manual_seed(seed + index) for index in range(count)],
        }
        return options, seed


def run_on(events: Sequence[Any], function: Any, inputs: Sequence[Any], outputs: Sequence[Any], name: str) -> None:
    """Let a function of the values by component run on events; `name` is the tab's, and the API's."""
    for index, event in enumerate(events):
        event(refusing(function), set(inputs), list(outputs), api_name=name.lower() if not index else False, **QUEUE)


# ---------------------------------------------------------------------------------------------------------------------
# Tabs


def task_tab(model: Any, model_id: str, name: str, abilities: Sequence[Ability], examples: Examples) -> None:
    """A tab whose tasks differ in what is given and what comes out."""
    fields = union(ability.generated for ability in abilities)
    draws = any(field.kind == IMAGES for field in fields)
    several = draws and name not in ("Enlarge", "Sound")
    with gr.Row():
        with gr.Column():
            picker = TaskPicker(abilities)
            how = next((one.how for one in fields if one.how), "")
            known = None
            if how and not draws:
                known = gr.Textbox(
                    "",
                    label="What it says already (may be empty)",
                    info=how,
                    max_length=MAX_CHARACTERS,
                    lines=1,
                    visible=bool(abilities[0].generated[0].how),
                )
            options = SamplingOptions(abilities[0], 4 if several else None)
            button = gr.Button(VERBS.get(name, name), variant="primary")
        with gr.Column():
            outputs = {field.name: generated_component(field, field in abilities[0].generated) for field in fields}

    def run(data: dict) -> Iterator[Any]:
        ability, values = picker.ability(data), picker.values(data)
        description = picker.description(values)
        if known is not None and ability.generated[0].how and (data[known] or "").strip():
            values[ability.generated[0].name] = read_text("What it says already", data[known])
        arguments, seed = options.read(data, ability)

        def call(callback: Any) -> dict[str, list]:
            arguments["callback_on_step_end"] = callback if draws else None
            return model(ability, values, **arguments)

        for done, made in steps_of(
            call, lambda latents: model.preview(ability, latents), arguments["num_inference_steps"]
        ):
            updates = {outputs[key]: value for key, value in made.items()}
            if done:
                updates = finished(ability, made, outputs, model, model_id, description)
                updates[options.seed] = seed
            if updates:
                yield updates

    def picked(task: str) -> list[Any]:
        ability = picker.abilities[task]
        return [
            *picker.shown(task, picker.fields, "given"),
            *picker.shown(task, fields, "generated"),
            *options.defaults(ability),
            *([gr.update(visible=bool(ability.generated[0].how))] if known else []),
        ]

    inputs = [picker.task, *picker.given.values(), *options.components, *([known] if known else [])]
    changed = [*picker.given.values(), *outputs.values(), options.guidance, options.steps, *([known] if known else [])]
    picker.task.change(picked, picker.task, changed, api_visibility="private")
    clicks = examples.show(picker)
    boxes = [one for field, one in zip(picker.fields, picker.given.values(), strict=True) if field.kind == TEXTS]
    events = [button.click, *(box.submit for box in boxes), *(click.then for click in clicks)]
    run_on(events, run, inputs, [*outputs.values(), options.seed], name)


def finished(
    ability: Ability, made: dict[str, list], outputs: dict[str, Any], model: Any, model_id: str, description: str
) -> dict[Any, Any]:
    """What the components of outputs show of what has been made; pictures with the texts that were made with them."""
    texts = [made[field.name] for field in ability.generated if field.kind in (TEXTS, LABELS)]
    captions = [" · ".join(map(str, row)) for row in zip(*texts, strict=True)]
    updates: dict[Any, Any] = {}
    for field in ability.generated:
        value, component = made[field.name], outputs[field.name]
        if field.kind == IMAGES:
            paths = saved_files(value, component.GRADIO_CACHE, model_id, description=description)
            updates[component] = list(zip(paths, captions, strict=True)) if captions else paths
        elif field.kind == AUDIOS:
            rate = model.segments[field.name].sampling_rate
            options = {"description": description, "sampling_rate": rate}
            (updates[component],) = saved_files(value[:1], component.GRADIO_CACHE, model_id, **options)
        else:
            updates[component] = "\n".join(map(str, value))
    return updates


def redraw_tab(model: Any, model_id: str, name: str, abilities: Sequence[Ability], examples: Examples) -> None:
    """A tab that draws a part of a picture anew: with a brush, or the share that fits worst."""
    brush = name == "Repaint"
    with gr.Row():
        with gr.Column():
            original = gr.State()
            picture = picture_component("Picture")
            canvas = gr.ImageEditor(
                type="pil",
                format="png",
                label="Paint over what is to change",
                brush=gr.Brush(default_size=48, colors=[BRUSH], color_mode="fixed"),
                layers=False,
                transforms=(),
                sources=(),  # it is given the picture above, made large
                canvas_size=(SIDE, SIDE),
                height=SIDE,
                visible=brush,
            )
            strength = gr.Slider(
                0.05, 1, 0.3, step=0.05, label="Strength: share that is drawn anew", visible=not brush
            )
            picker = TaskPicker(abilities)
            options = SamplingOptions(abilities[0], 4)
            button = gr.Button(name, variant="primary")
        with gr.Column():
            gallery = generated_component(abilities[0].generated[0], True)

    def run(data: dict) -> Iterator[Any]:
        ability, values = picker.ability(data), picker.values(data)
        description, target = picker.description(values), ability.generated[0].name
        arguments, seed = options.read(data, ability)
        if brush:
            image, arguments["mask_image"] = painted(data[canvas], data[original])
        else:
            image = read_picture("Picture", data[picture])
            arguments["strength"] = check_number("Strength", data[strength], 0, 1, above=True)
        values[target] = image

        def call(callback: Any) -> dict[str, list]:
            return model(ability, values, callback_on_step_end=callback, **arguments)

        for done, made in steps_of(
            call, lambda latents: model.preview(ability, latents), arguments["num_inference_steps"]
        ):
            images = made[target]
            if done:
                images = saved_files(images, gallery.GRADIO_CACHE, model_id, description=description, composite=True)
            yield {gallery: images, options.seed: seed if done else gr.skip()}

    def picked(task: str) -> list[Any]:
        return [*picker.shown(task, picker.fields, "given"), *options.defaults(picker.abilities[task])]

    def entered(task: str, image: Image.Image, caption: str) -> list[Any]:
        return [image, *(caption if one.name == examples.prompt else gr.skip() for one in picker.fields)]

    def opened(path: str | None) -> Iterator[Any]:
        yield (None, None) if path is None else enlarged(read_picture("Picture", path))

    given = list(picker.given.values())
    picker.task.change(picked, picker.task, [*given, options.guidance, options.steps], api_visibility="private")
    if brush:
        picture.change(refusing(opened), picture, [canvas, original], api_visibility="private")
    clicks = examples.show_files(IMAGES, entered, picker.task, [picture, *given])
    inputs = [picture, canvas, original, strength, picker.task, *given, *options.components]
    events = [button.click, *([] if brush else [click.then for click in clicks])]
    run_on(events, run, inputs, [gallery, options.seed], name)


def enlarged(picture: Image.Image) -> tuple[dict, Image.Image]:
    """What shows a picture in the editor, large enough to paint on, and the picture."""
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return {"background": picture.resize((width, height)), "layers": [], "composite": None}, picture


def painted(value: dict | None, original: Image.Image | None) -> tuple[Image.Image, Image.Image]:
    """The picture as it was uploaded, and its mask, white where the brush was.

    Raises:
        ValueError: if there is no picture, or nothing was painted on it.
    """
    background, layers = (value or {}).get("background"), (value or {}).get("layers") or []
    if background is None:
        raise ValueError("Give a picture first, and paint over what is to be drawn anew.")
    original = original or background.convert("RGB")  # of a program, which has no editor
    mask = np.zeros(background.size[::-1], dtype=bool)
    for layer in layers:
        mask |= np.asarray(layer.convert("RGBA").resize(background.size))[..., 3] > 0
    if not mask.any():
        raise ValueError("Paint over what is to be drawn anew: nothing is painted on the picture yet.")
    # A pixel is drawn anew where any of it is painted.
    return original, Image.fromarray(mask).resize(original.size, Image.Resampling.BOX).convert("L").point(
        lambda grey: 255 if grey else 0
    )
