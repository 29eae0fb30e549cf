"""Pictures from pictures through the public scripts: pairs prepared, encoded, trained, guided, evaluated."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.training.codes import CodeDataset


TINY = "--num_layers 1 --num_attention_heads 2 --attention_head_dim 8 --report_to none --train_batch_size 4"
TINY += " --max_train_steps 2"


@pytest.fixture
def prepare(script, root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "training"))
    return script("prepare_pairs")


def test_edges(prepare):
    """White where nothing changes, dark where it does, on both sides of the edge, and the same for each channel."""
    pixels = np.full((8, 8, 3), 255, dtype=np.uint8)
    pixels[:, 4:] = 0
    lines = np.asarray(prepare.edges(Image.fromarray(pixels)))
    assert (lines[:, 3:5] == 0).all() and (lines[:, :3] == 255).all() and (lines[:, 5:] == 255).all()
    assert np.array_equal(
        lines, np.asarray(prepare.edges(Image.fromarray(pixels.transpose(1, 0, 2)))).transpose(1, 0, 2)
    )
    red = pixels.copy()
    red[..., 1:] = 255
    assert np.array_equal(np.asarray(prepare.edges(Image.fromarray(red))), lines)
    faint = np.asarray(prepare.edges(Image.fromarray(255 - (255 - pixels) // 10)))
    assert 200 < faint[:, 3:5].min() < 255


def test_each_tone_has_the_picture_that_shows_it(prepare):
    """The brighter of the two is medium-light, however they are called; mixed ones are left out."""
    greys = {"1f44b": 200, "1f44b-1f3fc": 90, "1f44b-1f3fd": 160, "1f91a-1f3fc": 170, "1f91a-1f3fd": 80}
    greys |= {"1f6b5-1f3fb": 10, "1f6b5-1f3fb-200d-2642-fe0f": 20}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, grey in greys.items():
            data = io.BytesIO()
            Image.new("RGB", (8, 8), (grey,) * 3).save(data, format="PNG")
            info = tarfile.TarInfo(f"package/assets/{name}.png")
            info.size = data.tell()
            data.seek(0)
            archive.addfile(info, data)
    file.seek(0)
    with tarfile.open(fileobj=file) as archive:
        found = prepare.read_fluent(archive, 4)
    shown = {name: np.asarray(picture)[0, 0, 0] for name, picture in found.items()}
    assert shown == {"1F44B": 200, "1F44B-1F3FC": 160, "1F44B-1F3FD": 90, "1F91A-1F3FC": 170, "1F91A-1F3FD": 80} | {
        "1F6B5-1F3FB-200D-2642": 20
    }


@pytest.fixture
def pairs(tmp_path, image_vq, text_vq, tokenizer):
    """Someone's own data: two splits, no emoji."""
    datasets = pytest.importorskip("datasets")
    image_vq.save_pretrained(tmp_path / "image_vq")
    text_vq.save_pretrained(tmp_path / "text_vq")
    tokenizer.save_pretrained(tmp_path / "text_vq" / "tokenizer")
    generator = np.random.default_rng(0)
    columns = ("source", "image", "edges")
    rows = {
        name: [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(10)]
        for name in columns
    }
    rows |= {"text": ["a red apple", "a blue box"] * 5, "split": ["train"] * 7 + ["test"] * 3, "held_out": [""] * 10}
    features = datasets.Features({n: datasets.Image() if n in columns else datasets.Value("string") for n in rows})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "pairs.parquet"))
    return tmp_path


def test_pairs_from_the_data_to_guided_pictures_and_figures(run, pairs, monkeypatch, capsys):
    data = f"--dataset_name {pairs / 'pairs.parquet'} --image_vq {pairs / 'image_vq'} --text_vq {pairs / 'text_vq'}"
    segments = "--segment source=image:source --segment edges=image:edges"
    run("encode_dataset", f"{data} {segments} --resolution 32 --output_dir {pairs / 'codes'}")
    geometry = CodeDataset(pairs / "codes").segments
    assert {name: geometry[name]["shape"] for name in ("image", "source", "edges")} == dict.fromkeys(
        ("image", "source", "edges"), [8, 8]
    )
    assert geometry["source"]["shared_with"] == geometry["edges"]["shared_with"] == "image"
    own = f"--codes_dir {pairs / 'codes'} --image_vq {pairs / 'image_vq'} --text_vq {pairs / 'text_vq'}"
    tasks = "--tasks source->image,source+text->image,edges->image,image->edges,->image,->edges"
    Image.new("RGB", (20, 16), "blue").save(pairs / "blue.png")
    shown = f"--validation_images source={pairs / 'blue.png'} source={pairs / 'blue.png'} --validation_steps 1"
    run("train_vqdit", f"{own} {tasks} {TINY} {shown} --output_dir {pairs / 'out'}")
    assert Image.open(pairs / "out" / "samples" / "step-000002.png").size == (64, 32)
    assert "blue.png" in (pairs / "out" / "README.md").read_text()
    for wrong, message in [
        (f"source={pairs / 'blue.png'} {pairs / 'blue.png'}", "are of several segments"),
        ("source=/no/such.png", "must be files of pictures"),
        (f"{pairs / 'blue.png'} --validation_prompts red", None),
    ]:
        arguments = f"{own} {tasks} {TINY} --output_dir {pairs / 'x'} --validation_images {wrong}"
        with pytest.raises(SystemExit) if message is None else pytest.raises(ValueError, match=message):
            run("train_vqdit", arguments)
    pipe = VQDiTPipeline.from_pretrained(pairs / "out")
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (32, 32), "red")
    for guidance in (
        {"guidance_scale": 3.0, "image_guidance_scale": 1.5},
        {"guidance_scale": {"source": 1.5, "text": 3.0}},
    ):
        drawn = pipe("a blue box", inputs={"source": picture}, output="image", num_inference_steps=3, **guidance)
        assert drawn.images[0].size == (32, 32) and pipe.guidance_scale == {"source": 1.5, "text": 3.0}
    assert pipe(image=picture, output="edges", num_inference_steps=2).images[0].size == (32, 32)
    assert pipe(inputs={"edges": picture}, num_inference_steps=2).images[0].size == (32, 32)

    run(
        "evaluate",
        f"--pretrained_model_name_or_path {pairs / 'out'} --dataset_name {pairs / 'pairs.parquet'} --num_samples 2 "
        f"--num_inference_steps 1 --output_dir {pairs / 'out'}",
    )
    figures = json.loads((pairs / "out" / "evaluation.json").read_text())
    assert {"tokenizers", "image->image"} <= set(figures) <= {"tokenizers", "image->image", "inpainting", "likelihood"}
    found = figures["image->image"]
    assert len(found) == 8 and all(entry["count"] == 2 for entry in found.values())
    assert "image->edges, held-out compositions, nearest picture is the right one" in found
    assert "source+text->image, held-out compositions, nearest picture is the right one" in {
        name.replace("text+source", "source+text") for name in found
    }
    assert Image.open(pairs / "out" / "evaluation.png").size[0] > 300
    with pytest.raises(ValueError, match=r"caption_columns=\['none'\]: the data has \['held_out', 'split', 'text'\]"):
        run(
            "evaluate",
            f"--pretrained_model_name_or_path {pairs / 'out'} --dataset_name {pairs / 'pairs.parquet'} "
            f"--caption_columns none --output_dir {pairs / 'out'}",
        )


def test_a_picture_is_nearest_to_itself(run, pairs, image_vq, script):
    """`others` are the pictures of a column, whatever the split they are of."""
    evaluate = script("evaluate")
    options = f"--pretrained_model_name_or_path x --dataset_name {pairs / 'pairs.parquet'}".split()
    data = evaluate.EmojiData.load(image_vq, 16, evaluate.parse_args(options))
    assert data.composition and sorted(data.composition) == data.test == [7, 8, 9] and data.plain == []
    rows = [0, 6, 9]
    torch.testing.assert_close(data.others(rows, "image"), data.real(rows), atol=1e-6, rtol=0)
    assert (data.others(rows, "source") - data.real(rows)).abs().mean() > 0.1
    with pytest.raises(ValueError, match="column 'none' is not in the data"):
        data.others(rows, "none")
