"""Segments of any name: what they are stands in the pipeline's config."""

import copy
import json
import pickle

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_vqdit import MaskedDiffusionScheduler, MultiTokenizerModel, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.segment_base import ColumnReader, SegmentColumn, SegmentProcessor
from diffusers_vqdit.pipelines.segment_processors import MODALITIES
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.segment_columns import segment_flag


GEOMETRY = {
    "sketch": {"vocab_size": 32, "shape": [4, 4]},
    "small": {"vocab_size": 32, "shape": [4, 4], "shared_with": "sketch"},
    "style": {"vocab_size": 3, "shape": [1]},
    "document": {"vocab_size": 64, "shape": [12]},
    "summary": {"vocab_size": 64, "shape": [12], "shared_with": "document"},
}
SEGMENTS = {
    "sketch": {"modality": "image", "tokenizer": "image_vq"},
    "small": {"modality": "image", "lowres_of": "sketch", "factor": 4},
    "style": {"modality": "label", "names": ["flat", "round", "bold"]},
    "document": {"modality": "text"},
    "summary": {"modality": "text", "tokenizer": "text_vq"},
}
TASKS = [
    "document->summary",
    "style->sketch",
    "->sketch",
    "sketch->style",
    "small->sketch",
    "sketch+document->summary",
]
TASKS += ["->summary", "sketch+summary->style"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
MASK = Image.new("L", (16, 16))
MASK.paste(255, (0, 0, 8, 16))


def make(image_vq, text_vq, tokenizer, geometry=GEOMETRY, tasks=TASKS, **options):
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, segments=geometry, tasks=tasks
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    pipe = VQDiTPipeline(transformer.eval(), MaskedDiffusionScheduler(), image_vq, text_vq, tokenizer, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(image_vq, text_vq, tokenizer):
    return make(image_vq, text_vq, tokenizer, segments=SEGMENTS)


def seed(number=0):
    return torch.Generator().manual_seed(number)


def everything(pipe):
    """What the pipeline gives for each of its tasks."""
    codes = {"generator": seed(), "output_type": "latent"}
    repainted = pipe(inputs={"sketch": PICTURE}, output="sketch", mask_image=MASK, **codes).images
    candidates = {"document": "a dot", "summary": ["a box", "red"]}
    score = pipe.score("document->summary", inputs=candidates, num_samples=2, generator=seed())
    return [
        pipe(inputs={"style": "flat"}, **codes).images.tolist(),
        repainted.tolist(),
        pipe(inputs={"document": "a red apple"}, generator=seed()).texts,
        pipe(inputs={"summary": "a <mask> apple"}, generator=seed()).texts,
        pipe(inputs={"sketch": PICTURE}, generator=seed()).labels,
        pytest.approx(pipe.classify(inputs={"sketch": PICTURE}).probabilities[0].tolist(), rel=1e-4),
        pytest.approx(score.nll.tolist(), rel=1e-4),
    ]


def test_what_was_saved_and_loaded_or_copied_gives_the_same(pipe, tmp_path):
    expected = everything(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["segments"]["style"] == {"modality": "label", "names": {"0": "flat", "1": "round", "2": "bold"}}
    assert index["segments"]["small"] == {**SEGMENTS["small"], "tokenizer": "image_vq"}
    parts = {name for name, part in pipe.components.items() if part is not None}
    assert {name for name, value in index.items() if isinstance(value, list)} == parts
    loaded = [VQDiTPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)]
    for other in [*loaded, VQDiTPipeline.from_pipe(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))]:
        other.set_progress_bar_config(disable=True)
        for found, value in zip(everything(other), expected, strict=True):
            assert getattr(found, "expected", found) == value
        assert other.config.segments == pipe.config.segments


def test_a_picture_segment_has_what_image_has(pipe, monkeypatch):
    drawn = pipe(inputs={"style": ["bold", 0]}, num_images_per_prompt=2)
    assert len(drawn.images) == 4 and set(drawn.segments) == {"sketch"} and pipe.guidance_scale == 3.0
    assert pipe.num_timesteps == 16
    out = pipe(inputs={"sketch": PICTURE}, output="sketch", mask_image=MASK).images[0]
    assert np.array_equal(np.asarray(out)[:, 8:], np.asarray(PICTURE)[:, 8:])
    assert (np.asarray(out)[:, :8] != np.asarray(PICTURE)[:, :8]).mean() > 0.9
    codes = pipe.encode_image(PICTURE, "sketch")
    fixed = pipe(inputs={"sketch": PICTURE}, strength=0.25, output_type="latent").images
    assert (fixed != codes).sum() <= 4
    # `small` is four times smaller, by its own factor
    small = Image.fromarray(np.random.default_rng(1).integers(0, 255, (5, 7, 3), dtype=np.uint8))
    for arguments in ({"inputs": {"sketch": small}, "output": "sketch"}, {"inputs": {"small": small}}):
        assert pipe(**arguments, num_inference_steps=2).images[0].size == (28, 20)


def test_a_second_label_is_a_label(pipe, image_vq, text_vq, tokenizer):
    names = ["flat", "round", "bold"]
    assert pipe(inputs={"sketch": PICTURE}, output="style").labels[0] in names
    output = pipe.classify(inputs={"sketch": PICTURE})
    assert output.names == names and output.probabilities.shape == (1, 3)
    assert pipe.encode_label(["bold", 1], "style").tolist() == [[2], [1]]
    assert pipe.decode_label(torch.tensor([[2]]), "style") == ["bold"]
    geometry = {**GEOMETRY, "label": {"vocab_size": 2, "shape": [1]}}
    both = make(image_vq, text_vq, tokenizer, geometry, ["sketch->style", "sketch->label"], segments=SEGMENTS,
                labels=["a", "b"])  # fmt: skip
    assert both.classify(inputs={"sketch": PICTURE}).names == ["a", "b"]
    assert both.classify(inputs={"sketch": PICTURE}, output="style").names == names
    assert both(inputs={"sketch": PICTURE}, output="style").labels[0] in names
    with pytest.raises(ValueError, match="output='sketch' must be a label segment"):
        both.classify(inputs={"sketch": PICTURE}, output="sketch")
    with pytest.raises(ValueError, match=r"inputs\['style'\]='bald' must be a number in \[0, 3\) or one of .*flat"):
        pipe(inputs={"style": "bald"})


def test_the_output_is_that_of_the_only_task_from_what_was_passed(pipe):
    assert set(pipe(inputs={"document": "a dot"}).segments) == {"summary"}
    assert set(pipe(inputs={"document": "a dot", "sketch": PICTURE}).segments) == {"summary"}
    assert set(pipe(inputs={"summary": "a dot", "sketch": PICTURE}).segments) == {"style"}
    assert set(pipe(inputs={"small": PICTURE.resize((4, 4))}).segments) == {"sketch"}
    assert set(pipe(inputs={"summary": "a <mask>"}).segments) == {"summary"}
    assert set(pipe(inputs={"sketch": PICTURE}, mask_image=MASK).segments) == {"sketch"}
    message = r"\['(text|image)'\] was passed, but .* segments \['document', .*; it knows "
    for words in ({}, {"output": "summary"}):
        for lacking in ({"prompt": "a dot"}, {"image": PICTURE}):
            with pytest.raises(ValueError, match=message):
                pipe(**lacking, **words)
    with pytest.raises(ValueError, match="say what to generate, for one of ->sketch, ->summary"):
        pipe()  # two tasks
    with pytest.raises(ValueError, match=r"\['document', 'style'\] was passed; .* document->summary, style->sketch"):
        pipe(inputs={"document": "a dot", "style": 0})  # none


def test_where_the_tasks_do_not_tell_the_output_is_what_it_was(pipeline):
    """Two tasks from a picture: a text; two from nothing: a picture."""
    assert set(pipeline(image=PICTURE).segments) == {"text"}
    assert set(pipeline().segments) == {"image"}
    assert set(pipeline(image=PICTURE, mask_image=MASK).segments) == {"image"}
    pipeline.transformer.register_to_config(tasks=["image->label", "->image", "->image+text", "text->image"])
    assert set(pipeline(image=PICTURE).segments) == {"label"}
    assert set(pipeline("a dot").segments) == {"image"}


def test_tasks_are_a_table_of_what_a_call_does(pipe):
    rows = {row.task: row for row in pipe.tasks}
    assert list(rows) == ["+".join(sorted(t.split("->")[0].split("+"))) + "->" + t.split("->")[1] for t in TASKS]
    assert rows["document->summary"].call == 'pipe(inputs={"document": ...}, output="summary")'
    values = {"document": "a dot", "summary": "red", "sketch": PICTURE, "style": 1, "small": PICTURE.resize((4, 4))}
    for row in pipe.tasks:
        given = [name for name in row.task.split("->")[0].split("+") if name]
        pipe(inputs={name: values[name] for name in given}, output=row.task.split("->")[1])
        assert (pipe.guidance_scale, pipe.num_timesteps) == (row.guidance_scale, row.num_inference_steps)
    lines = str(pipe.tasks).splitlines()
    assert repr(pipe.tasks) == str(pipe.tasks) and len(lines) == 1 + len(TASKS)
    assert lines[0].split() == ["task", "steps", "guidance", "what", "to", "pass"]
    assert lines[1].split()[:3] == ["document->summary", "12", "1"]


def test_names_of_old_are_shown_with_their_arguments(pipeline):
    calls = {row.task: row.call for row in pipeline.tasks}
    assert calls["text->image"] == 'pipe(prompt=..., output="image")'
    assert calls["label->image"] == 'pipe(class_labels=..., output="image")'
    assert calls["->image+text"] == 'pipe(output="image+text")'


def test_components_are_those_that_the_pipeline_has_now(pipe, make_pipeline):
    before = everything(pipe)
    pipe.image_vq = make_pipeline(7).image_vq
    after = everything(pipe)
    assert after[0] != before[0] and after[2:4] == before[2:4]
    pipe.image_vq = None
    with pytest.raises(ValueError, match="needs the component image_vq, which is None"):
        pipe(inputs={"style": 0})


def test_an_entry_may_tell_an_old_name_anew(image_vq, text_vq, tokenizer):
    geometry = {"label": {"vocab_size": 2, "shape": [1]}, "image": {"vocab_size": 32, "shape": [4, 4]}}
    entry = {"label": {"modality": "label", "names": ["a", "b"]}}
    pipe = make(image_vq, text_vq, tokenizer, geometry, ["image->label"], segments=entry)
    assert pipe.classify(image=PICTURE).names == list(pipe.config.labels) == ["a", "b"]
    with pytest.raises(ValueError, match=r"labels=\['c'\] are not those of segments, \['a', 'b'\]"):
        make(image_vq, text_vq, tokenizer, geometry, ["image->label"], segments=entry, labels=["c"])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ({"sketch": {"modality": "smell"}}, r"segments\['sketch'\]\['modality'\]='smell' must be one of"),
        ({"sketch": {}}, r"\['modality'\]=None must be one of"),
        ({"sketch": "image"}, r"segments\['sketch'\]='image' must be a dict"),
        ({"speech": {"modality": "text"}}, "segments has 'speech', but the transformer has"),
        (["sketch"], r"segments=\['sketch'\] must be a dict"),
        ({"sketch": {"modality": "label"}}, r"'label' needs a grid of 1 dimensions, .*'sketch' of shape \[4, 4\]"),
        ({"style": {"modality": "image"}}, "needs a grid of 2 or 3 dimensions"),
        ({"sketch": {"modality": "image", "name": 3}}, "the option='name' must be one of"),
        ({"style": {"modality": "label", "tokenizer": "text_vq"}}, "the option='tokenizer'"),
        ({"small": {"modality": "image", "lowres_of": "style"}}, r"\['lowres_of'\]='style' must be one of .*sketch"),
        ({"small": {"modality": "image", "lowres_of": "small"}}, r"\['lowres_of'\]='small'"),
        ({"small": {"modality": "image", "lowres_of": "sketch", "factor": 1}}, r"\['factor'\]=1 must be an integer"),
        ({"small": {"modality": "image", "factor": 2}}, "needs 'lowres_of'"),
        ({"style": {"modality": "label", "names": ["a"] * 4}}, "are 4, but the transformer has 3 codes"),
        ({"style": {"modality": "label", "names": [1, 2]}}, r"names of labels=\[1, 2\] must be a list of strings"),
        ({"style": {"modality": "label", "names": {"a": "b"}}}, "must be a list, or a dict by code"),
        ({"style": {"modality": "label", "names": {0: "a", 2: "b"}}}, r"of all codes from 0 on, and are of \[0, 2\]"),
        ({"style": {"modality": "label", "names": {"1": "a"}}}, r"of all codes from 0 on, and are of \[1\]"),
    ],
)
def test_entries_that_do_not_fit_are_named(image_vq, text_vq, tokenizer, segments, message):
    with pytest.raises(ValueError, match=message):
        make(image_vq, text_vq, tokenizer, segments=segments)


def test_tokenizers_of_a_container_are_used_by_name_only(image_vq, text_vq, tokenizer, caplog):
    several, own = MultiTokenizerModel({"own": image_vq}), {"sketch": {"modality": "image", "tokenizer": "own"}}
    with caplog.at_level("WARNING", "diffusers_vqdit"):
        pipe = make(image_vq, text_vq, tokenizer, segments=own, segment_tokenizers=several)
        assert "segment_tokenizers" not in caplog.text
        make(*(pipe.components[name] for name in ("image_vq", "text_vq", "tokenizer")), segment_tokenizers=several)
        assert "segment_tokenizers has ['own'], which no entry of segments names" in caplog.text
    for wrong, message in [
        (image_vq, "segment_tokenizers is ImageVQModel; put it into a MultiTokenizerModel"),
        (MultiTokenizerModel({"pixel_processor": image_vq}), r"has \['pixel_processor'\], which components"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(image_vq, text_vq, tokenizer, segment_tokenizers=wrong)
        pipe.segment_tokenizers = wrong
        with pytest.raises(ValueError, match=message):
            pipe(output="sketch", num_inference_steps=1)


def test_a_container_that_is_left_out_is_missed_at_use_only(image_vq, text_vq, tokenizer, tmp_path, caplog):
    several, own = MultiTokenizerModel({"own": image_vq}), {"sketch": {"modality": "image", "tokenizer": "own"}}
    make(image_vq, text_vq, tokenizer, segments=own, segment_tokenizers=several).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\['tokenizer'\]='own' must be one of .*image_vq.*'other'"):
        VQDiTPipeline.from_pretrained(tmp_path, segment_tokenizers=MultiTokenizerModel({"other": image_vq}))
    with caplog.at_level("WARNING", "diffusers_vqdit"):
        pipe = VQDiTPipeline.from_pretrained(tmp_path, segment_tokenizers=None)
    assert "segments name the tokenizers ['own'], which are not there" in caplog.text
    assert pipe(output="sketch", num_inference_steps=1, output_type="latent").segments["sketch"].shape == (1, 4, 4)
    with pytest.raises(ValueError, match="needs the component own, which is None"):
        pipe(output="sketch", num_inference_steps=1)


def test_a_text_without_its_tokenizer_is_missed_by_name(image_vq, text_vq, tokenizer):
    several = MultiTokenizerModel({"own": text_vq}, {"own": tokenizer})
    own = {"document": {"modality": "text", "tokenizer": "own"}, "summary": {"modality": "text"}}
    pipe = make(image_vq, text_vq, tokenizer, segments=own, segment_tokenizers=several)
    pipe.segment_tokenizers = None
    for use in (lambda: pipe(inputs={"document": "a dot"}), lambda: pipe.encode_prompt(["a"], segment="document")):
        with pytest.raises(ValueError, match="needs the component own, which is None"):
            use()


def test_pictures_without_their_tokenizer_are_missed_by_name(pipe):
    gallery = pipe.index(inputs={"style": ["flat", "bold"]}, query="sketch")
    pipe.image_vq = None
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    for use in (
        lambda: pipe.retrieve(PICTURE, gallery),
        lambda: pipe.encode_image(PICTURE, segment="sketch"),
        lambda: pipe.decode_image(codes, segment="sketch"),
    ):
        with pytest.raises(ValueError, match="needs the component image_vq, which is None"):
            use()
    assert pipe.retrieve(codes, gallery).indices.shape == (1, 2)
    assert pipe.encode_label(["bold"], segment="style").tolist() == [[2]]


def test_a_strength_is_refused_where_the_task_that_ranks_codes_is_unknown(image_vq, text_vq, tokenizer):
    pipe = make(image_vq, text_vq, tokenizer, tasks=["->sketch+style", "sketch->style"], segments=SEGMENTS)
    call = {"inputs": {"sketch": PICTURE}, "output": "sketch+style", "num_inference_steps": 1}
    assert pipe(**call, mask_image=MASK).segments["style"]
    with pytest.raises(ValueError, match="strength=0.5 finds what to redraw by '->sketch', which .*mask_image"):
        pipe(**call, strength=0.5)


def test_long_candidates_are_told_by_their_argument(pipe, caplog):
    with caplog.at_level("WARNING", "diffusers_vqdit"):
        pipe.classify(inputs={"document": "a"}, labels=["a " * 40, "the " * 40], output="summary", num_samples=1)
    assert "of labels have more than" in caplog.text


def test_a_long_negative_prompt_is_told_by_its_argument(pipeline, caplog):
    with caplog.at_level("WARNING", "diffusers_vqdit"):
        pipeline("a dot", negative_prompt="a " * 40, num_inference_steps=1)
    assert "texts of negative_prompt have more than" in caplog.text and "of prompt" not in caplog.text


def test_codes_that_are_none_are_not_decoded(pipe):
    assert pipe.decode_image(torch.zeros(1, 4, 4, dtype=torch.int64), segment="sketch")[0].size == (16, 16)
    for decode, segment, size in ((pipe.decode_label, "style", 3), (pipe.decode_image, "sketch", 32)):
        for code in (-1, size):
            with pytest.raises(ValueError, match=rf"codes must be in \[0, {size}\)"):
                decode(torch.full((1, *GEOMETRY[segment]["shape"]), code), segment=segment)


def test_what_a_callback_returns_is_checked(pipe):
    several = {"inputs": {"style": "flat"}, "generator": seed(), "num_inference_steps": 3, "output_type": "latent"}
    expected = pipe(**several, callback_on_step_end=lambda pipe, step, time, tensors: None).images
    several["generator"] = seed()
    assert torch.equal(
        pipe(**several, callback_on_step_end=lambda pipe, step, time, tensors: tensors).images, expected
    )
    for outputs, message in [
        ([1], r"callback_on_step_end returned \[1\]; it must be a dict"),
        ({"latents": None}, r"must be torch.int64 codes of 'sketch' of shape \(1, 4, 4\), got None"),
        ({"latents": torch.zeros(1, 4, 4)}, "got torch.float32"),
        ({"latents": torch.zeros(1, 4, 2, dtype=torch.int64)}, r"got torch.int64 of shape \(1, 4, 2\)"),
        ({"latents": {"sketch": 3}}, "must be torch.int64 codes"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(**several, callback_on_step_end=lambda *_, outputs=outputs: outputs)


def test_what_is_passed_is_named_by_its_segment(pipe):
    for name, value in (("sketch", "cat.png"), ("document", 3), ("style", 9)):
        with pytest.raises(ValueError, match=rf"inputs\['{name}'\]"):
            pipe(inputs={name: value})
    with pytest.raises(ValueError, match=r"mask_image needs inputs\['sketch'\], and an output with it"):
        pipe(inputs={"document": "a dot"}, output="summary", mask_image=MASK)


class NumberReader(ColumnReader):
    """A column of integers from 0."""

    shape = [1]

    def __init__(self, dataset, column, tokenizer=None, beside=None, *, most=9, **options):
        super().__init__(dataset, column)
        if not all(isinstance(value, int) and 0 <= value <= most for value in dataset[column]):
            raise ValueError(f"column {column!r} must hold integers from 0 to {most}")
        self.entry = {"most": most}

    @property
    def vocab_size(self):
        return self.entry["most"] + 1

    def read(self, row):
        return self.dataset[row][self.column]

    def digest(self, values):
        return str(values).encode()

    def encode(self, values, batch_size):
        return [torch.tensor([[value]]) for value in values]


class NumberSegment(SegmentProcessor):
    """Numbers, one code each: as a contributor would add them."""

    options = ("most",)
    reader = NumberReader
    noun = "number"

    def read(self, value):
        return [int(one) for one in (value if isinstance(value, list) else [value])]

    def encode(self, values):
        return torch.tensor(values, device=self.device())[:, None]

    def decode(self, codes, output_type="pil"):
        return codes[:, 0].tolist()


def test_a_new_modality_is_a_file_and_a_line(image_vq, text_vq, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setitem(MODALITIES, "number", NumberSegment)
    data = datasets.Dataset.from_dict({"age": [3, 0, 9], "drawing": [PICTURE] * 3})
    columns = {"age": SegmentColumn("number", "age"), "sketch": SegmentColumn("image", "drawing", image_vq)}
    codes = CodeDataset(encode_dataset(data, tmp_path / "codes", segments=columns))
    assert codes.codes["age"].tolist() == [[3], [0], [9]]
    assert codes.entries["age"] == {"modality": "number", "most": 9}
    assert codes.segments["age"] == {"vocab_size": 10, "shape": [1]}
    assert str(segment_flag("age=number:years")) == "age=number:years"
    entries = {**codes.entries, "sketch": {"modality": "image"}}
    pipe = make(image_vq, text_vq, tokenizer, codes.segments, ["sketch->age", "age->sketch"], segments=entries)
    pipe.save_pretrained(tmp_path / "pipe")
    for one in (pipe, VQDiTPipeline.from_pretrained(tmp_path / "pipe")):
        one.set_progress_bar_config(disable=True)
        assert one(inputs={"sketch": PICTURE}).segments["age"][0] in range(10)
        assert len(one(inputs={"age": [0, 2]}).images) == 2
        gallery = one.index(inputs={"age": [1, 2, 3]})
        assert one.retrieve(PICTURE, gallery, top_k=3).indices.sort().values.tolist() == [[0, 1, 2]]
        assert one.score("age->sketch", inputs={"age": [1, 2], "sketch": PICTURE}, num_samples=2).nll.shape == (2,)
        with pytest.raises(ValueError, match=r"asks for 'age', which you passed: it is given or generated"):
            one(inputs={"age": 3}, output="age")
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (SegmentProcessor,), {"read": lambda self, value: value})(
            "age", {}, {"vocab_size": 1, "shape": [1]}, {}, "crop", None
        )
    with pytest.raises(ValueError, match="column 'age' must hold integers from 0 to 9"):
        encode_dataset(datasets.Dataset.from_dict({"age": [99]}), tmp_path / "x", segments={"age": columns["age"]})


def test_columns_that_do_not_fit_are_named(image_vq, text_vq, tmp_path):
    data = datasets.Dataset.from_dict({"kind": ["a", "b"], "drawing": [PICTURE] * 2})
    picture = SegmentColumn("image", "drawing", image_vq)
    for columns, message in [
        ({"kind": SegmentColumn("smell", "kind")}, "modality='smell' must be one of"),
        ({"kind": SegmentColumn("label", "kind", image_vq)}, r"segments\['kind'\] has a tokenizer, which a label"),
        ({"sketch": SegmentColumn("image", "drawing")}, r"segments\['sketch'\] needs a tokenizer .* or image_vq"),
        ({"title": SegmentColumn("text", "kind", text_vq)}, r"\['title'\]: its tokenizer needs a tokenizer beside it"),
        ({"kind": SegmentColumn("label", "style")}, "column 'style' is not in the data"),
        ({"kind": "label"}, r"segments\['kind'\]='label' must be a SegmentColumn"),
        ({"keys": SegmentColumn("label", "kind")}, "segments: 'keys' can't be a name"),
        ({"training": SegmentColumn("label", "kind")}, "segments: 'training' can't be a name"),
        ({"image_processor": SegmentColumn("image", "drawing", image_vq)}, "can't be called 'image_processor'"),
        ({"a": picture, "a_prompts": picture}, "segments has 'a', and 'a_prompts', what its variants are called"),
        ({"a": picture, "b": SegmentColumn("image", "kind", image_vq)}, "column 'kind': none of the 2 pictures"),
        ({"kind": SegmentColumn("label", "kind", options={"names": ["a"]})}, r"the labels \['b'\] are not among"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode_dataset(data, tmp_path, segments=columns)
    with pytest.raises(ValueError, match="segments has 'label', which another argument makes too"):
        encode_dataset(data, tmp_path, label_column="kind", segments={"label": SegmentColumn("label", "kind")})
