"""Which tabs a pipeline has: those of the tasks that it knows, whatever its segments are called."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vqdit.app.abilities import (
    AUDIOS,
    IMAGES,
    LABELS,
    TEXTS,
    Ability,
    CodesModel,
    Field,
    LatentModel,
    by_tab,
    chosen_among_texts,
    repaintable,
    searches,
)
from diffusers_vqdit.app.unmasking import unmasking_image


TAB_OF = {
    **{"text->image": "Draw", "label->image": "Draw", "->image": "Draw", "->image+text": "Pairs"},
    **{"image->text": "Caption", "image->text_zh": "Caption", "image->label": "Label", "text->label": "Label"},
    **{"->text": "Texts", "text->text_zh": "Texts", "sketch->image": "Edit", "sketch+text->image": "Edit"},
    **{"image_lowres->image": "Enlarge", "image_lowres+text->image": "Enlarge"},
}


def knowing(pipeline, tasks, **components):
    """The pipeline with a transformer that knows these tasks, and with other components."""
    transformer = copy.copy(pipeline.transformer)
    transformer._internal_dict = type(transformer.config)({**transformer.config, "tasks": list(tasks)})
    parts = {**pipeline.components, **components, "transformer": transformer}
    return type(pipeline)(**parts, labels=list(pipeline.config.labels), lowres_factor=2)


@given(tasks=st.sets(st.sampled_from(sorted(TAB_OF))))
def test_each_task_has_one_tab_and_others_none(page_pipeline, tasks):
    tabs = by_tab(CodesModel(knowing(page_pipeline, sorted(tasks))).abilities)
    shown = {ability.task: name for name, abilities in tabs.items() for ability in abilities}
    assert shown == {task: TAB_OF[task] for task in tasks}
    assert sum(map(len, tabs.values())) == len(tasks)


def test_tasks_whose_tokenizer_is_not_there_are_not_shown(page_pipeline):
    abilities = CodesModel(knowing(page_pipeline, TAB_OF, image_vq=None)).abilities
    assert {ability.task for ability in abilities} == {"->text", "text->text_zh", "text->label"}


def test_what_can_be_repainted_chosen_and_searched(page_pipeline):
    abilities = CodesModel(page_pipeline).abilities
    assert {one.task for one in repaintable(abilities)} == {"text->image", "label->image", "->image"}
    assert {one.task for one in chosen_among_texts(abilities)} == {"image->text", "image->text_zh"}
    pairs = {(items.name, query.name) for items, query in searches(abilities)}
    assert {("image", "text"), ("image", "text_zh"), ("text", "image"), ("text_zh", "image")} <= pairs
    assert not any("label" in pair or "image_lowres" in pair or pair == ("text", "text_zh") for pair in pairs)


@pytest.mark.parametrize(
    ("given_kinds", "generated_kinds", "tab"),
    [
        *(((AUDIOS,), (kind,), "Sound") for kind in (TEXTS, IMAGES, LABELS, AUDIOS)),
        *(((kind,), (AUDIOS,), "Sound") for kind in (TEXTS, IMAGES, LABELS)),
        *(((), (TEXTS, AUDIOS), "Sound"), ((), (IMAGES, IMAGES), "Pairs"), ((LABELS,), (TEXTS,), "Texts")),
        *(((IMAGES, LABELS), (TEXTS,), "Caption"), ((IMAGES, TEXTS), (LABELS,), "Label"), ((), (LABELS,), "Label")),
    ],
)
def test_tabs_go_by_the_kinds_of_values_alone(given_kinds, generated_kinds, tab):
    sides = (
        tuple(Field(f"{side}{i}", kind) for i, kind in enumerate(kinds))
        for side, kinds in enumerate((given_kinds, generated_kinds))
    )
    assert list(by_tab([Ability("any", *sides, 4, None)])) == [tab]


def test_fields_say_what_a_person_needs(page_pipeline):
    abilities = {one.task: one for one in CodesModel(page_pipeline).abilities}
    assert abilities["label->image"].given[0].choices == ("fruit", "box", "dot")
    assert abilities["image_lowres->image"].given[0].tile == (8, 8)
    assert "<mask>" in abilities["->text"].generated[0].how
    rows = {row.task: row for row in page_pipeline.tasks}
    assert all(one.num_inference_steps == rows[task].num_inference_steps for task, one in abilities.items())
    assert abilities["text->image"].guidance_scale == rows["text->image"].guidance_scale
    assert abilities["->image"].guidance_scale is None
    assert abilities["image_lowres+text->image"].title == "image_lowres + text → image"


def test_a_pipeline_over_latents_draws_from_what_it_takes(latent_page_pipeline):
    model = LatentModel(latent_page_pipeline)
    assert [one.task for one in model.abilities] == ["text->image", "label->image", "->image"]
    assert model.abilities[1].given[0].choices == ("apple", "1", "2")
    assert len(repaintable(model.abilities)) == 3 and set(by_tab(model.abilities)) == {"Draw"}


def test_codes_that_are_masked_are_grey(page_pipeline):
    segment = page_pipeline._segments["image"]
    codes = torch.randint(32, (2, 4, 4))
    whole = unmasking_image(segment, codes)
    assert [np.array(one).tolist() for one in whole] == [
        np.array(one).tolist() for one in page_pipeline.decode_image(codes)
    ]
    grey = np.array(unmasking_image(segment, torch.full_like(codes, 32))[0])
    assert (grey == round(0.75 * 255)).all()
    codes[:, :2] = 32
    half = np.array(unmasking_image(segment, codes)[0])
    assert (half[:8] == round(0.75 * 255)).all() and not (half[8:] == round(0.75 * 255)).all()
