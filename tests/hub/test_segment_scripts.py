"""Segments of any name through the public scripts, with no line of the package changed for them: data encoded,
trained, published, loaded with and without the package, drawn, repainted, classified, retrieved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vqdit import ImageVQModel, MultiTokenizerModel, TextVQModel, VQDiTPipeline
from diffusers_vqdit.training.byte_pairs import train_text_tokenizer
from diffusers_vqdit.training.codes import CodeDataset


CELLS = Path(__file__).parent / "segment_cells.py"
TUNE = "--report_to none --train_batch_size 4 --max_train_steps 2"
TINY = f"--num_layers 1 --num_attention_heads 2 --attention_head_dim 16 {TUNE}"
STYLES = ["flat", "round", "bold"]


@pytest.fixture
def places(image_vq, text_vq, tokenizer, tmp_path):
    """Folders of tokenizers, one of grey pictures on a grid of another size among them, and the data."""
    torch.manual_seed(1)
    sketch_vq = ImageVQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=16,
        sample_size=12,
    )
    for name, model in (("image_vq", image_vq), ("text_vq", text_vq), ("sketch_vq", sketch_vq)):
        model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "text_vq" / "tokenizer")
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 255, (20, 20, 3), dtype=np.uint8) for _ in range(8)]
    rows = {
        "photo": [Image.fromarray(one) for one in pixels],
        "drawing": [Image.fromarray(one[..., 0]) for one in pixels],
        "style": [STYLES[i % 3] for i in range(8)],
        "kind": [("box", "dot")[i % 2] for i in range(8)],
        "body": [f"a {word} box and a dot" for word in ("red", "blue", "pink", "green") * 2],
        "abstract": [f"a {word} box" for word in ("red", "blue", "pink", "green") * 2],
    }
    features = datasets.Features(
        {name: datasets.Image() if name in ("photo", "drawing") else datasets.Value("string") for name in rows}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data.parquet"))
    return tmp_path


def published(folder, hub, client, name):
    """The pipeline of a run: as it was saved, and pushed to the local Hub and loaded again; and what a process without
    the package makes of it there."""
    saved = VQDiTPipeline.from_pretrained(folder)
    saved.push_to_hub(f"alice/segments-{name}")
    loaded = VQDiTPipeline.from_pretrained(f"alice/segments-{name}", cache_dir=folder.parent / "cache")
    for pipe in (saved, loaded):
        pipe.set_progress_bar_config(disable=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder.parent / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_alice"}
    environment["HF_HUB_DISABLE_XET"] = "1"
    output = folder.parent / f"{name}.json"
    done = subprocess.run(
        [sys.executable, CELLS, f"alice/segments-{name}", str(output)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return saved, loaded, json.loads(output.read_text())


@pytest.mark.slow
def test_sketch(run, places, hub, client):
    """Pictures with their own tokenizer beside the pictures there are: ``sketch``, of one channel, 6 x 6 codes."""
    data = f"--dataset_name {places / 'data.parquet'} --image_column photo --image_vq {places / 'image_vq'}"
    sketch = f"--segment sketch=image:drawing:{places / 'sketch_vq'}"
    tasks = "--tasks image->sketch,sketch->image,->sketch"
    run("encode_dataset", f"{data} {sketch} --output_dir {places / 'codes'}")
    codes = CodeDataset(places / "codes")
    assert codes.segments == {
        "image": {"vocab_size": 32, "shape": [4, 4], "centered_positions": True},
        "sketch": {"vocab_size": 16, "shape": [6, 6], "centered_positions": True},
    }
    assert codes.entries["sketch"] == {"modality": "image", "tokenizer": "sketch"}
    own = f"--codes_dir {places / 'codes'} --image_vq {places / 'image_vq'}"
    with pytest.raises(ValueError, match=r"the codes of 'sketch' .* give it as --segment sketch=image:COLUMN:TOKENIZ"):
        run("train_vqdit", f"{own} {tasks} {TINY} --output_dir {places / 'x'}")
    run("train_vqdit", f"{own} {sketch} {tasks} {TINY} --output_dir {places / 'out'}")
    # Encoded at the start: the same codes.
    run("train_vqdit", f"{data} {sketch} {tasks} {TINY} --output_dir {places / 'again'}")
    again = CodeDataset(places / "again" / "codes")
    assert all(torch.equal(again.codes[name], codes.codes[name]) for name in codes.codes)

    saved, loaded, found = published(places / "out", hub, client, "sketch")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    mask = Image.new("L", (24, 24))
    mask.paste(255, (0, 0, 12, 24))
    for pipe in (saved, loaded):
        assert [row.task for row in pipe.tasks] == ["image->sketch", "sketch->image", "->sketch"]
        drawn = pipe(image=picture, num_images_per_prompt=2, generator=torch.Generator().manual_seed(0))
        assert set(drawn.segments) == {"sketch"} and len(drawn.images) == 2
        assert drawn.images[0].mode == "L" and drawn.images[0].size == (12, 12) and pipe.guidance_scale == 3.0
        assert pipe(inputs={"sketch": drawn.images[0]}).images[0].size == (16, 16)
        assert pipe(output="sketch", output_type="latent").segments["sketch"].shape == (1, 6, 6)
        repainted = np.asarray(pipe(inputs={"sketch": picture}, output="sketch", mask_image=mask).images[0])
        assert np.array_equal(repainted[:, 12:], np.asarray(picture.convert("L"))[:, 12:])
        assert (repainted[:, :12] != np.asarray(picture.convert("L"))[:, :12]).mean() > 0.5
        codes_of = pipe.encode_image(picture, "sketch")
        repaired = pipe(inputs={"sketch": picture}, strength=0.25, output_type="latent").segments["sketch"]
        assert (repaired != codes_of).sum() <= 9
        gallery = pipe.index(inputs={"sketch": drawn.images}, query="image")
        assert pipe.retrieve(picture, gallery, top_k=2).indices.sort().values.tolist() == [[0, 1]]
        assert len(pipe.index(image=[picture, picture])) == 2  # by the only segment there is a task of
        nll = pipe.score("image->sketch", image=picture, inputs={"sketch": drawn.images}, num_samples=2).nll
        assert nll.shape == (2,) and nll.isfinite().all()
    assert saved.segment_tokenizers.tokenizers["sketch"].config.in_channels == 1
    code = saved(image=picture, generator=torch.Generator().manual_seed(0), output_type="latent").segments
    other = loaded(image=picture, generator=torch.Generator().manual_seed(0), output_type="latent").segments
    assert torch.equal(code["sketch"], other["sketch"])
    assert found["image->sketch"] == ["list", 1, "L"] and found["->sketch"] == ["list", 1, "L"]
    assert found["repainted"] == {"sketch": True}

    # A pipeline's finetuning keeps its segment's tokenizer, and takes another segment in.
    tuned = f"--pretrained_model_name_or_path {places / 'out'} --dataset_name {places / 'data.parquet'} {TUNE}"
    run(
        "train_vqdit",
        f"{tuned} --segment sketch=image:drawing --segment style=label:style --tasks sketch->style,style->sketch "
        f"--output_dir {places / 'tuned'}",
    )
    pipe = VQDiTPipeline.from_pretrained(places / "tuned")
    assert pipe.config.segments["sketch"] == {"modality": "image", "tokenizer": "sketch"}
    assert pipe.classify(inputs={"sketch": picture}).labels[0] in STYLES
    with pytest.raises(ValueError, match="'sketch' is made by another tokenizer in the pretrained pipeline"):
        run(
            "train_vqdit",
            f"{tuned} --segment sketch=image:drawing:{places / 'image_vq'} --tasks=->sketch "
            f"--output_dir {places / 'y'}",
        )


@pytest.mark.slow
def test_style(run, places, hub, client):
    """A second label."""
    data = f"--dataset_name {places / 'data.parquet'} --image_column photo --image_vq {places / 'image_vq'}"
    labels = "--label_column kind --segment style=label:style"
    run(
        "train_vqdit",
        f"{data} {labels} --tasks style->image,image->style,image->label,->image {TINY} --output_dir {places / 'out'}",
    )
    saved, loaded, found = published(places / "out", hub, client, "style")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    for pipe in (saved, loaded):
        assert pipe.config.segments["style"]["names"] == {"0": "bold", "1": "flat", "2": "round"}
        assert list(pipe.config.labels) == ["box", "dot"]
        assert pipe(inputs={"style": ["bold", "flat"]}).images[0].size == (16, 16)
        assert pipe(image=picture, output="style").labels[0] in STYLES
        assert pipe(image=picture, output="style", output_type="latent").labels.shape == (1, 1)
        assert pipe.classify(image=picture).names == ["box", "dot"]
        assert pipe.classify(image=picture, output="style").names == ["bold", "flat", "round"]
        gallery = pipe.index(inputs={"style": ["bold", "round"]})
        assert pipe.retrieve(picture, gallery, top_k=2).indices.sort().values.tolist() == [[0, 1]]
        with pytest.raises(ValueError, match=r"inputs\['style'\] .* no part can be filled in|asks for 'style'"):
            pipe(inputs={"style": "bold"}, output="style")
    assert found["style->image"] == ["list", 1, "RGB"] and found["image->style"][:2] == ["list", 1]
    assert found["labels"] == ["bold", "flat", "round"]
    # Labels alone.
    only = f"--dataset_name {places / 'data.parquet'} --segment style=label:style --segment kind=label:kind"
    run("train_vqdit", f"{only} --tasks=->style,style->kind {TINY} --output_dir {places / 'labels'}")
    pipe = VQDiTPipeline.from_pretrained(places / "labels")
    assert pipe().labels[0] in STYLES and pipe(inputs={"style": "bold"}).labels[0] in ("box", "dot")


@pytest.mark.slow
def test_document_to_summary(run, places, hub, client):
    """A pair of texts that are not ``text``, by one tokenizer, and then by two."""
    data = f"--dataset_name {places / 'data.parquet'} --text_vq {places / 'text_vq'}"
    texts = "--segment document=text:body --segment summary=text:abstract"
    run("encode_dataset", f"{data} {texts} --output_dir {places / 'codes'}")
    codes = CodeDataset(places / "codes")
    assert set(codes.segments) == {"document", "summary"} and codes.segments["summary"]["shared_with"] == "document"
    own = f"--codes_dir {places / 'codes'} --text_vq {places / 'text_vq'}"
    run("train_vqdit", f"{own} --tasks document->summary {TINY} --output_dir {places / 'one'}")
    pipe = VQDiTPipeline.from_pretrained(places / "one")
    assert pipe.segment_tokenizers is None and pipe.image_vq is None
    assert "segment_tokenizers" not in json.loads((places / "one" / "model_index.json").read_text())
    assert set(pipe(inputs={"document": "a red box and a dot"}).segments) == {"summary"}

    summary = f"--segment document=text:body --segment summary=text:abstract:{places / 'other_vq'}"
    model = type(pipe.text_vq).from_pretrained(places / "text_vq")
    model.to_logits.bias.data.add_(0.1)
    model.save_pretrained(places / "other_vq")
    pipe.tokenizer.save_pretrained(places / "other_vq" / "tokenizer")
    tasks = "--tasks document->summary,->summary"
    run(
        "train_vqdit",
        f"{data} {summary} {tasks} {TINY} --output_dir {places / 'out'} --validation_prompts red --validation_steps 2",
    )
    assert "red: " in (places / "out" / "samples" / "step-000002.txt").read_text()
    card = (places / "out" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "document-to-summary" in card
    saved, loaded, found = published(places / "out", hub, client, "summary")
    document = "a red box and a dot"
    for pipe in (saved, loaded):
        assert pipe.config.segments["summary"] == {"modality": "text", "tokenizer": "summary"}
        assert set(pipe(inputs={"document": [document, "a dot"]}).segments) == {"summary"}
        filled = pipe(inputs={"document": document, "summary": "a <mask> box"}).texts[0]
        assert filled.startswith("a") and filled.endswith(" box") and "<mask>" not in filled
        gallery = pipe.index(inputs={"summary": ["a red box", "a dot"]})
        assert (gallery.query, pipe.retrieve(document, gallery, top_k=1).indices.shape) == ("document", (1, 1))
        output = pipe.classify(inputs={"document": document}, labels=["a red box", "green"], output="summary")
        assert output.names == ["a red box", "green"] and output.probabilities.shape == (1, 2)
    assert found["document->summary"] == ["list", 1, None] and found["repainted"] == {"summary": True}


@pytest.mark.slow
def test_two_texts_with_tokenizers_of_their_own(run, places, hub, client):
    """Token ids of two bare tokenizers, and of a third for all others: encoded, trained, published, gone on with."""
    for name, words, size in (("one", ["a red box and a dot"] * 3, 262), ("two", ["a blue box", "green"] * 3, 266)):
        train_text_tokenizer(words, size).save_pretrained(places / name)
    bodies = f"--segment document=text:body:{places / 'one'}"
    named = f"{bodies} --segment summary=text:abstract:{places / 'two'}"
    texts = f"{named} --block_length 4 --max_text_length 24"
    data = f"--dataset_name {places / 'data.parquet'}"
    run("encode_dataset", f"{data} {texts} --output_dir {places / 'codes'}")
    codes = CodeDataset(places / "codes")
    assert {name: entry["tokenizer"] for name, entry in codes.entries.items()} == {
        "document": "document",
        "summary": "summary",
    }
    assert all(segment["block_length"] == 4 and "shared_with" not in segment for segment in codes.segments.values())
    tasks = "--tasks document->summary,summary->document,->summary"
    with pytest.raises(ValueError, match=r"give it as --segment document=text:COLUMN:TOKENIZER"):
        run("train_vqdit", f"--codes_dir {places / 'codes'} --text_vq {places / 'text_vq'} {tasks} {TINY} "
            f"--output_dir {places / 'x'}")  # fmt: skip
    run("train_vqdit", f"--codes_dir {places / 'codes'} {named} {tasks} {TINY} --output_dir {places / 'out'}")
    saved, loaded, found = published(places / "out", hub, client, "tokens")
    assert found["document->summary"] == ["list", 1, None]
    for pipe in (saved, loaded):
        assert pipe.tokenizer is None and sorted(pipe.segment_tokenizers.alone) == ["document", "summary"]
        one, two = (pipe._segment(name) for name in ("document", "summary"))
        assert (one.vocab_size, two.vocab_size) == (len(one.vq), len(two.vq))
        for segment, text in ((one, "a green dot"), (two, "pink")):
            assert segment.decode(segment.encode([text])) == [text]
        options = {"output": "summary", "gen_length": 8, "num_inference_steps": 2}
        texts_of = pipe(inputs={"document": "a dot", "summary": "a red"}, **options).texts
        assert texts_of[0].startswith("a red")
        assert len(pipe.index(inputs={"summary": ["a dot", "green"]})) == 2
    # What the pretrained pipeline has goes on, under its names.
    again = f"{data} --pretrained_model_name_or_path {places / 'out'} --segment document=text:body "
    again += f"--segment summary=text:abstract --max_text_length 24 --tasks document->summary {TUNE}"
    run("train_vqdit", f"{again} --output_dir {places / 'more'}")
    more = VQDiTPipeline.from_pretrained(places / "more")
    assert more.config.segments == saved.config.segments and sorted(more.segment_tokenizers.alone)[0] == "document"
    # One of them is that of all texts: it is known by its name there.
    run(
        "train_vqdit", f"{data} --text_tokenizer {places / 'one'} {texts} {tasks} {TINY} --output_dir {places / 'own'}"
    )
    pipe = VQDiTPipeline.from_pretrained(places / "own")
    assert {name: entry["tokenizer"] for name, entry in pipe.config.segments.items()} == {
        "document": "tokenizer",
        "summary": "summary",
    }
    for wrong, message in (
        ({"document": {"modality": "text", "tokenizer": "text_vq"}}, "'text_vq' makes none"),
        ({"document": {"modality": "text", "tokenizer": "other"}}, "TextVQModel, but .* needs token ids"),
    ):
        model = saved.components | {
            "segment_tokenizers": MultiTokenizerModel(
                {"other": TextVQModel.from_pretrained(places / "text_vq"), "summary": two.vq}, {"other": one.vq}
            )
        }
        with pytest.raises(ValueError, match=message):
            VQDiTPipeline(**model, segments=saved.config.segments | wrong)
