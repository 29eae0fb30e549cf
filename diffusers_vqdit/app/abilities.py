"""What a pipeline can do for a person: its tasks, by what is given and what comes out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..models.vae_latents import decode_latents
from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..pipelines.pipeline_vqdit_latent import VQDiTLatentPipeline
from ..pipelines.segment_base import ARGUMENTS, IMAGE, LABEL, TEXT
from ..tasks import Task
from ..utils.token_ids import BLANK
from .unmasking import unmasking_image


IMAGES, TEXTS, LABELS, AUDIOS = "images", "texts", "labels", "audios"  # fields of a pipeline's output


@dataclass(frozen=True)
class Field:
    """Something that is given or comes out.

    Args:
        name: of the segment; for a pipeline without segments, of the one that its argument stands for.
        kind: the field of a pipeline's output that such values are of.
        choices: what a label can be.
        tile: height and width in pixels of one tile of a picture that is enlarged in tiles.
        how: how a part of it can be given where it comes out, for texts; "" where it can't.
        repaintable: whether a part of it can be given where it comes out, for pictures.
        comparable: whether its values can be the items of a gallery.
    """

    name: str
    kind: str
    choices: tuple[str, ...] = ()
    tile: tuple[int, int] | None = None
    how: str = ""
    repaintable: bool = False
    comparable: bool = False


@dataclass(frozen=True)
class Ability:
    """A task of a pipeline, with what it has by default.

    Args:
        task: the arrow.
        guidance_scale: None where guidance has no effect.
    """

    task: str
    given: tuple[Field, ...]
    generated: tuple[Field, ...]
    num_inference_steps: int
    guidance_scale: float | None

    @property
    def title(self) -> str:
        """The arrow as a person reads it."""
        sides = (" + ".join(field.name for field in fields) for fields in (self.given, self.generated))
        return " → ".join(side or "nothing" for side in sides)

    def gives(self, kind: str) -> bool:
        return any(field.kind == kind for field in self.given)

    def generates(self, *kinds: str) -> bool:
        """Whether values of just these kinds come out."""
        return tuple(field.kind for field in self.generated) == kinds


def arguments_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call that pass values by segment."""
    own = {segment: argument for argument, segment in ARGUMENTS.items()}
    arguments = {own[name]: value for name, value in values.items() if name in own}
    inputs = {name: value for name, value in values.items() if name not in own}
    return arguments | ({"inputs": inputs} if inputs else {})


class CodesModel:
    """A [`VQDiTPipeline`] on the page.

    Args:
        pipeline: the pipeline.

    Attributes:
        abilities (`list[Ability]`): in the order of its tasks; those of values that a page can't show are left out.
    """

    def __init__(self, pipeline: VQDiTPipeline) -> None:
        self.pipeline, self.segments = pipeline, pipeline._segments
        components = pipeline._tokenizing_components
        fields = {
            name: self._field(segment)
            for name, segment in self.segments.items()
            if segment.kind and all(map(components.get, segment.needs))
        }
        self.abilities: list[Ability] = []
        for row in pipeline.tasks:
            task = Task.parse(row.task)
            if fields.keys() >= set(task.segments):
                given, generated = (tuple(fields[name] for name in names) for names in (task.given, task.generated))
                guidance_scale = row.guidance_scale if pipeline._can_guide(task) else None
                self.abilities.append(Ability(row.task, given, generated, row.num_inference_steps, guidance_scale))

    @staticmethod
    def _field(segment: Any) -> Field:
        kind = segment.kind
        names = segment.decode(torch.arange(segment.vocab_size)[:, None]) if kind == LABELS else ()
        height, width = segment.resolution if segment.tiled else (0, 0)
        how = "The text goes on from here." if segment.continues else ""
        if kind == TEXTS and not segment.given_only:
            blank = getattr(segment.beside if segment.named_beside else segment.vq, "mask_token", None) or BLANK
            how = f"{how} {blank} stands for one token to fill in.".strip()
        return Field(
            segment.name,
            kind,
            tuple(names),
            (height // segment.entry["factor"], width // segment.entry["factor"]) if segment.tiled else None,
            how,
            repaintable=segment.takes_mask and kind == IMAGES and not segment.tiled,
            comparable=not segment.given_only and segment.block_length is None and not segment.tiled,
        )

    def __call__(self, ability: Ability, values: Mapping[str, Any], **options: Any) -> dict[str, list]:
        """What comes out, by segment; `values` are what is given or partly known, by segment."""
        output = "+".join(field.name for field in ability.generated)
        return self.pipeline(**arguments_of(values), output=output, **options).segments

    def preview(self, ability: Ability, latents: Any) -> dict[str, list]:
        """Pictures of the codes after a step, by segment, grey where they are unknown."""
        if any(field.tile for field in ability.given):
            return {}
        codes = latents if isinstance(latents, dict) else {ability.generated[0].name: latents}
        shown = [field.name for field in ability.generated if field.kind == IMAGES]
        return {name: unmasking_image(self.segments[name], codes[name]) for name in shown}


class LatentModel:
    """A [`VQDiTLatentPipeline`] on the page, as [`CodesModel`]."""

    def __init__(self, pipeline: VQDiTLatentPipeline) -> None:
        self.pipeline = pipeline
        config, given = pipeline.transformer.config, []
        if pipeline.text_encoder is not None and pipeline.tokenizer is not None:
            given.append(Field(TEXT, TEXTS))
        if config.num_embeds_ada_norm:
            names = pipeline.config.id2label or {}
            given.append(
                Field(LABEL, LABELS, tuple(names.get(str(i), str(i)) for i in range(config.num_embeds_ada_norm)))
            )
        image = Field(IMAGE, IMAGES, repaintable=True)
        ways = [((field,), 4.0) for field in given] + [((), None)]
        self.abilities = [
            Ability(str(Task(tuple(field.name for field in side), (IMAGE,))), side, (image,), 50, guidance_scale)
            for side, guidance_scale in ways
        ]

    def __call__(self, ability: Ability, values: Mapping[str, Any], **options: Any) -> dict[str, list]:
        options = {name: value for name, value in options.items() if value is not None}
        return {IMAGE: self.pipeline(**arguments_of(values), **options).images}

    def preview(self, ability: Ability, latents: Any) -> dict[str, list]:
        """Pictures of the latents after a step."""
        pixels = decode_latents(self.pipeline.vae, latents).float()
        return {IMAGE: self.pipeline.image_processor.postprocess(pixels, output_type="pil")}


# ---------------------------------------------------------------------------------------------------------------------
# Tabs


# What a tab is for, by its name: the first that an ability fits shows it.
TABS: dict[str, Callable[[Ability], bool]] = {
    "Sound": lambda one: one.gives(AUDIOS) or any(field.kind == AUDIOS for field in one.generated),
    "Pairs": lambda one: len(one.generated) > 1,
    "Label": lambda one: one.generates(LABELS),
    "Enlarge": lambda one: any(field.tile for field in one.given),
    "Edit": lambda one: one.generates(IMAGES) and one.gives(IMAGES),
    "Draw": lambda one: one.generates(IMAGES),
    "Caption": lambda one: one.gives(IMAGES),
    "Texts": lambda one: one.generates(TEXTS),
}


def by_tab(abilities: Iterable[Ability]) -> dict[str, list[Ability]]:
    """Abilities by the tab that shows them; one that none shows is left out."""
    tabs: dict[str, list[Ability]] = {}
    for ability in abilities:
        if name := next((name for name, fits in TABS.items() if fits(ability)), None):
            tabs.setdefault(name, []).append(ability)
    return tabs


def repaintable(abilities: Iterable[Ability]) -> list[Ability]:
    """Those that make a picture of which a part may be given, and that no other picture is given for."""
    return [
        one for one in abilities if one.generates(IMAGES) and one.generated[0].repaintable and not one.gives(IMAGES)
    ]


def chosen_among_texts(abilities: Iterable[Ability]) -> list[Ability]:
    """Those by which a picture or a sound is labelled among texts that the person gives."""
    return [one for one in abilities if one.generates(TEXTS) and (one.gives(IMAGES) or one.gives(AUDIOS))]


def searches(abilities: Iterable[Ability]) -> list[tuple[Field, Field]]:
    """Pairs of what a gallery can hold and what it can be searched by, pictures or sounds one of them."""
    found = {}
    for one in abilities:
        if len(one.given) == len(one.generated) == 1:
            for items, query in ((one.generated[0], one.given[0]), (one.given[0], one.generated[0])):
                kinds = {items.kind, query.kind}
                if items.comparable and items.kind in (IMAGES, TEXTS) and LABELS not in kinds and kinds != {TEXTS}:
                    if not query.tile:
                        found[items.name, query.name] = (items, query)
    return sorted(found.values(), key=lambda pair: pair[0].kind)
