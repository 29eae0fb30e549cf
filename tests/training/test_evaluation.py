"""The data that pipelines are measured on, and how drawn pictures are judged."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from diffusers_vqdit.training.evaluation import check_colours
from diffusers_vqdit.training.evaluation_files import report_folder
from diffusers_vqdit.training.image_losses import BackboneFeatures
from diffusers_vqdit.utils.decoding import decode_image, to_pixels


@pytest.fixture
def styles(tmp_path):
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(10)]
    rows = {
        "image": pictures,
        "text": [f"thing {i}" for i in range(10)],
        "unseen": ["gadget", "", "gizmo", *[""] * 7],
        "split": ["train"] * 6 + ["test"] * 4,
        "held_out": [""] * 6 + ["composition", "style", "style", "picture"],
    }
    features = {name: datasets.Value("string") for name in rows} | {"image": datasets.Image()}
    path = tmp_path / "styles.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))
    return path


def test_the_sets_that_are_measured_and_both_judges(styles, image_vq, script):
    evaluate = script("evaluate")
    args = evaluate.parse_args(f"--pretrained_model_name_or_path x --dataset_name {styles}".split())
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    data = evaluate.EmojiData.load(image_vq, 16, args, BackboneFeatures(ResNetModel(config)))
    assert data.composition == [6] and sorted(data.styles) == [7, 8] and sorted(data.unseen) == [0, 2]
    own = data.decoded / 2 + 0.5
    rows = [0, 4, 9]
    right = data.judged(own[rows], rows, 2)
    assert {how: figure["value"] for how, figure in right.items()} == {"": 1.0, " by features": 1.0}
    wrong = data.judged(own[rows], [1, 2, 3], 2)
    assert {how: figure["value"] for how, figure in wrong.items()} == {"": 0.0, " by features": 0.0}
    assert data.nearest_by(own[rows], 2) == {"": rows, " by features": rows}
    without = evaluate.EmojiData.load(image_vq, 16, args)
    assert without.judged(own[rows], rows, 2).keys() == without.nearest_by(own[rows], 2).keys() == {""}


def test_whatever_is_drawn_has_both_judges_and_prompts_a_sheet(styles, pipeline, script, tmp_path):
    table = datasets.Dataset.from_parquet(str(styles), cache_dir=str(tmp_path / "cache"))
    table = table.add_column("emoji", table["text"]).add_column("label", [f"kind {i % 3}" for i in range(10)])
    table.to_parquet(str(tmp_path / "data.parquet"))
    pipeline.save_pretrained(tmp_path / "pipe")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "judge")
    evaluate = script("evaluate")
    words = ["--pretrained_model_name_or_path", str(tmp_path / "pipe"), "--features", str(tmp_path / "judge")]
    words += ["--dataset_name", str(tmp_path / "data.parquet"), "--num_samples", "4", "--num_inference_steps", "1"]
    tasks = "text->image,label->image,inpainting,->image+text"
    args = evaluate.parse_args([*words, "--output_dir", str(tmp_path / "out"), "--tasks", tasks])
    evaluate.main(args)
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(report) == tasks.split(",")
    for figures in report.values():
        by_pixels = [name for name in figures if "nearest picture" in name and "by features" not in name]
        assert by_pixels
        for name in by_pixels:
            assert figures[name.replace("nearest picture", "nearest picture by features")]["count"] > 0
    assert Image.open(tmp_path / "out" / "evaluation_prompts.png").size[0] > 300

    data = evaluate.EmojiData.load(pipeline.image_vq, 16, args)
    data.composition = [row % 10 for row in range(60)]
    rows = evaluate.prompt_rows(pipeline, data, args)
    assert [title for title, _ in rows][::5] == ["held-out compositions, 1 to 8", "held-out compositions, 41 to 48"]
    assert [text for _, cells in rows for _, text in cells] == data.texts(data.composition[:48])


@pytest.mark.parametrize("missing", ["train", "test"])
def test_data_without_a_split_say_what_would_do(styles, image_vq, script, missing):
    table = datasets.Dataset.from_parquet(str(styles)).filter(lambda row: row["split"] != missing)
    table.to_parquet(str(styles))
    evaluate = script("evaluate")
    args = evaluate.parse_args(f"--pretrained_model_name_or_path x --dataset_name {styles}".split())
    with pytest.raises(
        ValueError, match=f"split='{missing}' is not in the data: .* give --dataset_name data that have"
    ):
        evaluate.EmojiData.load(image_vq, 16, args)


def test_what_cannot_be_read_is_left_out_with_its_texts(styles, image_vq, script, caplog):
    table = datasets.load_dataset("parquet", data_files=str(styles), split="train").cast_column(
        "image", datasets.Image(decode=False)
    )
    broken = {"image": {"bytes": b"none", "path": None}}
    rows = [{**row, **broken} if place in (2, 8) else row for place, row in enumerate(table)]
    datasets.Dataset.from_list(rows, features=table.features).to_parquet(styles)
    evaluate = script("evaluate")
    args = evaluate.parse_args(f"--pretrained_model_name_or_path x --dataset_name {styles}".split())
    data = evaluate.EmojiData.load(image_vq, 16, args)
    kept = [0, 1, 3, 4, 5, 6, 7, 9]
    assert data.texts(list(range(8))) == [f"thing {row}" for row in kept]
    assert (data.composition, data.styles, data.test, data.unseen) == ([5], [6], [5, 6, 7], [0])
    expected = torch.stack([decode_image(rows[row]["image"], 16) for row in kept])
    assert torch.allclose(to_pixels(data.pictures), expected, atol=1 / 127)
    assert torch.equal(data.others([4, 7], "image"), expected[[4, 7]] / 2 + 0.5)
    assert caplog.text.count("skipped picture") == 2 and "max_samples" not in caplog.text
    few = evaluate.EmojiData.load(image_vq, 16, args, max_samples=3)
    assert few.texts(list(range(4))) == ["thing 0", "thing 1", "thing 6", "thing 7"]  # 2 and 8 can't be read
    assert "of 6 rows of split='train' the first max_samples=3 are measured" in caplog.text


@pytest.mark.parametrize("resize_mode", ["crop", "pad"])
def test_pictures_are_read_as_the_pipeline_reads_them(resize_mode, pipeline, script, tmp_path, monkeypatch):
    """Padding leaves white above and below a wide black picture, cropping does not."""
    black = [Image.new("RGB", (32, 16))] * 4
    kinds = {"image": datasets.Image(), "sketch": datasets.Image(), "split": datasets.Value("string")}
    columns = {"image": black, "sketch": black, "split": ["train"] * 2 + ["test"] * 2}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(tmp_path / "wide.parquet")
    pipeline.register_to_config(resize_mode=resize_mode)
    pipeline.save_pretrained(tmp_path / "pipe")
    evaluate, found = script("evaluate"), []
    monkeypatch.setitem(evaluate.MEASURES, "tokenizers", lambda pipe, data, args: found.append(data) or {})
    monkeypatch.setattr(evaluate, "draw_rows", lambda rows, font: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(evaluate, "task_rows", lambda *args: [])
    source = f"--pretrained_model_name_or_path {tmp_path / 'pipe'} --dataset_name {tmp_path / 'wide.parquet'}"
    evaluate.main(evaluate.parse_args([*source.split(), "--tasks=tokenizers"]))
    (data,) = found
    for pictures in (data.real([0, 3]), data.others([0, 3], "sketch")):
        assert bool((pictures[:, :, 0] == 1).all()) == (resize_mode == "pad") and (pictures[:, :, 8] < 0.1).all()


def test_a_judge_of_another_size_is_refused_before_the_work(styles, image_vq, script, monkeypatch):
    evaluate = script("evaluate")
    args = evaluate.parse_args(f"--pretrained_model_name_or_path x --dataset_name {styles}".split())
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    backbone = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16))
    evaluate.EmojiData.load(image_vq, 16, args, BackboneFeatures(backbone, image_size=32))
    monkeypatch.setattr("diffusers_vqdit.training.evaluation.reconstruct", None)
    with pytest.raises(ValueError, match="features_image_size=None: ViTModel doesn't take pictures of 16 px"):
        evaluate.EmojiData.load(image_vq, 16, args, BackboneFeatures(backbone))


@pytest.mark.parametrize("missing", ["unseen", "held_out"])
@pytest.mark.parametrize("empty", [True, False])
def test_columns_of_these_sets_may_be_empty_or_missing(styles, image_vq, script, missing, empty, tmp_path):
    data = datasets.load_dataset("parquet", data_files=str(styles), split="train", cache_dir=str(tmp_path / "cache"))
    data = data.remove_columns(missing)
    if empty:
        data = data.add_column(missing, [None] * len(data), feature=datasets.Value("string"))
    path = tmp_path / "other.parquet"
    data.to_parquet(str(path))
    evaluate = script("evaluate")
    args = evaluate.parse_args(f"--pretrained_model_name_or_path x --dataset_name {path}".split())
    data = evaluate.EmojiData.load(image_vq, 16, args)
    if missing == "unseen":
        assert data.unseen == [] and data.composition == [6] and sorted(data.styles) == [7, 8]
    else:
        assert data.styles == [] and sorted(data.composition) == [6, 7, 8, 9] and sorted(data.unseen) == [0, 2]


def test_pictures_of_other_sizes_are_judged_beside_their_own(styles, pipeline, script, tmp_path, monkeypatch):
    """What a pipeline draws that returns each prompt's picture, fitted to the size, is right."""
    pipeline.save_pretrained(tmp_path / "pipe")
    evaluate, data = script("evaluate"), []
    source = ["--pretrained_model_name_or_path", str(tmp_path / "pipe"), "--dataset_name", str(styles)]
    measure = evaluate.MEASURES["sizes"]

    def draw(pipe, args, count, size, output, passed, height, width):
        fitted = data[0].at_size(pipe.image_vq, (height, width), args)
        rows = [data[0].columns["text"].index(text) for text in passed["text"]]
        if (height, width) == (8, 24):
            rows = [row + 1 for row in rows]  # another's
        assert fitted.decoded.shape[2:] == (height, width)
        return fitted.decoded[rows] / 2 + 0.5

    monkeypatch.setattr("diffusers_vqdit.training.evaluation_images.sample", draw)
    args = evaluate.parse_args([*source, "--tasks", "sizes", "--sizes", "16,16;24,16;8,24", "--num_samples", "4"])
    data.append(evaluate.EmojiData.load(pipeline.image_vq, 16, args))
    figures = measure(pipeline, data[0], args)
    assert [figure["value"] for figure in figures.values()] == [1, 1, 1, 1, 0, 0]
    assert next(iter(figures)) == "16 x 16 px, training captions, nearest picture is the one named"
    monkeypatch.setattr(evaluate, "measure_tasks", None)
    for sizes, told in (("16,18", "width=18 must be a multiple of 4"), ("16,16;65536,65536", "65536] needs .* GiB")):
        with pytest.raises(ValueError, match=told):
            evaluate.main(evaluate.parse_args([*source, "--tasks", "sizes", "--sizes", sizes]))
    pipeline.transformer.register_to_config(tasks=["->image"])
    pipeline.save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"sizes=\[\[16, 16\]\] needs a task from captions to pictures: .*'->image'"):
        evaluate.main(evaluate.parse_args([*source, "--sizes", "16,16"]))


def test_a_column_that_is_missing_is_told_before_anything_is_drawn(styles, pipeline, script, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "pipe")
    evaluate = script("evaluate")
    source = ["--pretrained_model_name_or_path", str(tmp_path / "pipe"), "--dataset_name", str(styles)]
    monkeypatch.setattr("diffusers_vqdit.training.evaluation.read_pictures", None)
    with pytest.raises(ValueError, match=r"label_column='label': the data has \['held_out', .* out \['label->image',"):
        evaluate.main(evaluate.parse_args(source))
    with pytest.raises(ValueError, match=r"caption_columns=\['words'\]: the data has \['held_out',"):
        evaluate.main(evaluate.parse_args([*source, "--tasks", "text->image", "--caption_columns", "words"]))
    with pytest.raises(TypeError):  # goes on
        evaluate.main(evaluate.parse_args([*source, "--tasks", "text->image", "--label_column", "kind"]))


# Whether figures that a killed run has measured are taken after it.
CHANGES = {"nothing": True, "other tasks": True, "an option": False, "the pipeline": False, "the data": False}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_is_killed_leaves_its_figures_to_the_same_run(
    change, styles, pipeline, script, tmp_path, monkeypatch
):
    pipeline.save_pretrained(tmp_path / "pipe")
    evaluate, called = script("evaluate"), []

    def measure(name, *_):
        called.append(name)
        return {"right": {"value": 0.5}}

    for name in ("tokenizers", "retrieval", "likelihood"):
        monkeypatch.setitem(evaluate.MEASURES, name, partial(measure, name))
    monkeypatch.setattr(evaluate, "draw_rows", lambda rows, font: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(evaluate, "task_rows", lambda *args: [])
    words = ["--pretrained_model_name_or_path", str(tmp_path / "pipe"), "--dataset_name", str(styles)]
    words += ["--output_dir", str(tmp_path / "out"), "--num_samples", "4", "--tasks"]
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setitem(evaluate.MEASURES, "retrieval", lambda *args: 1 / 0)
        evaluate.main(evaluate.parse_args([*words, "tokenizers,retrieval"]))
    assert list(json.loads((tmp_path / "out" / "evaluation.json").read_text())) == ["tokenizers"]
    monkeypatch.setitem(evaluate.MEASURES, "retrieval", partial(measure, "retrieval"))
    tasks = "retrieval,likelihood,tokenizers" if change == "other tasks" else "tokenizers,retrieval"
    if change == "the pipeline":
        next(pipeline.transformer.parameters()).data.add_(1)
        pipeline.save_pretrained(tmp_path / "pipe")
    if change == "the data":
        table = datasets.Dataset.from_parquet(str(styles), cache_dir=str(tmp_path / "cache"))
        table.map(lambda row: {"text": f"a {row['text']}"}).to_parquet(str(styles))
    called.clear()
    evaluate.main(evaluate.parse_args([*words, tasks, *(["--seed", "1"] if change == "an option" else [])]))
    assert ("tokenizers" not in called) == CHANGES[change]
    assert list(json.loads((tmp_path / "out" / "evaluation.json").read_text())) == tasks.split(",")
    called.clear()
    evaluate.main(evaluate.parse_args([*words, tasks]))  # one that has ended is measured anew
    assert called == tasks.split(",")


def test_sizes_and_their_task_are_given_together(script, capsys):
    source = ["--pretrained_model_name_or_path", "pipe"]
    for given, told in (
        (["--tasks", "sizes,likelihood"], "--tasks sizes needs --sizes"),
        (["--tasks", "text->image", "--sizes", "16,16"], "has no effect without a task of 'sizes'"),
    ):
        with pytest.raises(SystemExit):
            script("evaluate").parse_args([*source, *given])
        assert told in capsys.readouterr().err


def test_pipelines_of_grey_pictures_are_refused():
    for channels, refused in ((1, True), (3, False)):
        vq = SimpleNamespace(config=SimpleNamespace(in_channels=channels))
        with pytest.raises(ValueError, match="in_channels=1") if refused else nullcontext():
            check_colours(SimpleNamespace(image_vq=vq))


def test_a_pipeline_of_the_hub_is_told_of_in_outputs(script, tmp_path, monkeypatch):
    """A folder of its name would be taken for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/model").mkdir(parents=True)
    for name in ("evaluate", "evaluate_speech"):
        parsed = script(name).parse_args
        places = {"you/model": "outputs/you--model", "mine/model": "mine/model", "mine/model/": "mine/model"}
        for named, place in places.items():
            assert report_folder(parsed(["--pretrained_model_name_or_path", named])) == Path(place)
        args = parsed(["--pretrained_model_name_or_path", "you/model", "--output_dir", "there"])
        assert report_folder(args) == Path("there")
