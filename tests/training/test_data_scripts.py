"""What the training scripts make of data, tokenizers and pipelines as users have them; a step or two each."""

import json
import logging
import re

import numpy as np
import pytest
import soundfile
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from diffusers_vqdit import ImageVQModel, VQDiTLatentPipeline, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.segment_columns import load_tokenizers, segment_flag
from diffusers_vqdit.training.tokenizers import load_codec, load_image_vq, load_text_vq
from diffusers_vqdit.utils.fingerprints import model_fingerprint


@pytest.fixture
def tokenizers(image_vq, text_vq, tokenizer, tmp_path):
    image_vq.save_pretrained(tmp_path / "image_vq")
    text_vq.save_pretrained(tmp_path / "text_vq")
    tokenizer.save_pretrained(tmp_path / "text_vq" / "tokenizer")
    return f"--image_vq {tmp_path / 'image_vq'} --text_vq {tmp_path / 'text_vq'}"


MODELS = ("image", "text", "states", "image_states")  # modalities of what has weights
TINY = "--num_layers 1 --num_attention_heads 2 --attention_head_dim 8 --report_to none --train_batch_size 4"
TINY += " --max_train_steps 1"
FINETUNE = "--report_to none --train_batch_size 4 --max_train_steps 1"


def change_rows(folder, change):
    """Rewrite the rows of metadata.jsonl, each given with its number."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{**row, **change(index, row)} for index, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_tokenizer_is_one_of_its_modality(run, tokenizers, pipeline, picture_folder, tmp_path):
    """One folder may hold several, and what makes codes of another modality is refused."""
    pipeline.save_pretrained(tmp_path / "pipe")
    data, pipe = f"--train_data_dir {picture_folder} --output_dir {tmp_path / 'codes'}", tmp_path / "pipe"
    both = f"--image_vq {pipe} --text_vq {pipe} --segment sketch=image:image:{pipe} --segment words=text:text:{pipe}"
    run("encode_dataset", f"{data} {both}")
    codes = CodeDataset(tmp_path / "codes")
    assert {n: one["tokenizer"] for n, one in codes.entries.items()} == {
        "image": "image_vq", "text": "text_vq", "sketch": "image_vq", "words": "text_vq"}  # fmt: skip
    for tokenizer in ("text_vq", "image_vq"):
        path, modality = tmp_path / tokenizer, "image" if tokenizer == "text_vq" else "text"
        with pytest.raises(ValueError, match="_class_name='.*' must be"):
            run("encode_dataset", f"{data} {tokenizers} --segment other={modality}:{modality}:{path}")
    for wrong in ("/no/such/folder", tmp_path / "none", tmp_path / "image_vq" / "config.json"):
        with pytest.raises(ValueError, match=f"{wrong}' is no folder that is there"):
            run("encode_dataset", f"{data} --segment sketch=image:image:{wrong}")


def test_a_column_that_is_named_is_not_left_out(run, tokenizers, picture_folder, tmp_path):
    data = f"--train_data_dir {picture_folder} {tokenizers} --segment style=label:label"
    for wrong in ("--image_column picture", "--caption_column words"):
        with pytest.raises(ValueError, match=f"column '{wrong.split()[1]}' is not in the data"):
            run("encode_dataset", f"{data} {wrong} --output_dir {tmp_path / 'codes'}")


def test_a_column_of_a_tokenizer_that_no_segment_takes_is_not_left_out(run, tokenizers, picture_folder, tmp_path):
    image_vq = " ".join(tokenizers.split()[:2])
    change_rows(picture_folder, lambda index, row: {"codes": [1, 2]})
    rows = (picture_folder / "metadata.jsonl").read_text()
    (picture_folder / "metadata.jsonl").write_text(rows.replace('"text":', '"title":'))
    data = f"--train_data_dir {picture_folder} --code_columns codes --output_dir {tmp_path / 'codes'}"
    with pytest.raises(ValueError, match="column 'text' is not in the data"):
        run("encode_dataset", f"{data} {tokenizers}")
    run("encode_dataset", f"{data} {tokenizers} --segment title=text:title")
    run("encode_dataset", f"{data} {image_vq}")


def test_texts_alone(run, tokenizers, picture_folder, tmp_path):
    text_vq = tokenizers.split()[-1]
    run(
        "train_vqdit",
        f"--train_data_dir {picture_folder} --text_vq {text_vq} --tasks=->text {TINY} --output_dir {tmp_path / 'out'}",
    )
    pipe = VQDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.image_vq is None and len(pipe(output="text", num_inference_steps=1).texts) == 1


def test_how_pictures_are_read_reaches_the_pipeline(run, tokenizers, picture_folder, tmp_path):
    data = f"--train_data_dir {picture_folder} --tasks image_lowres->image"
    run("train_vqdit", f"{data} {tokenizers} {TINY} --lowres_factor 4 --resize_mode pad --output_dir {tmp_path / 'a'}")
    run(
        "encode_dataset",
        f"--train_data_dir {picture_folder} {tokenizers} --lowres_factor 4 --resize_mode pad "
        f"--output_dir {tmp_path / 'codes'}",
    )
    codes = f"--codes_dir {tmp_path / 'codes'} --tasks image_lowres->image"
    run("train_vqdit", f"{codes} {tokenizers} {TINY} --output_dir {tmp_path / 'b'}")
    tuned = f"--pretrained_model_name_or_path {tmp_path / 'a'} {FINETUNE} --output_dir {tmp_path / 'c'}"
    run("train_vqdit", f"{data} {tuned}")
    for name in "abc":
        config = VQDiTPipeline.from_pretrained(tmp_path / name).config
        assert (config.lowres_factor, config.resize_mode) == (4, "pad"), name
    for flag, message in [
        ("--lowres_factor 2", "lowres_factor=2, but the "),
        ("--resize_mode crop", "resize_mode='crop'"),
    ]:
        with pytest.raises(ValueError, match=message):
            run("train_vqdit", f"{codes} {tokenizers} {TINY} {flag} --output_dir {tmp_path / 'x'}")
    with pytest.raises(ValueError, match="lowres_factor=2, but the pretrained pipeline's is 4"):
        run("train_vqdit", f"{data} {tuned} --lowres_factor 2")


def test_what_was_lost_in_the_encoding_is_said_before_training(run, tokenizers, picture_folder, tmp_path, caplog):
    change_rows(picture_folder, lambda index, row: {"text": "word " * 40} if index < 2 else {})
    (picture_folder / "broken.png").write_bytes(b"no picture")
    with open(picture_folder / "metadata.jsonl", "a") as metadata:
        metadata.write("\n" + json.dumps({"file_name": "broken.png", "text": "a dot"}))
    encode = f"--train_data_dir {picture_folder} {tokenizers} --output_dir {tmp_path / 'codes'}"
    for _ in range(2):  # the second finds them there
        caplog.clear()
        run("encode_dataset", encode)
        lost = [record.message for record in caplog.records]
        assert sum("are cut" in one for one in lost) == sum("could not be read" in one for one in lost) == 1
    caplog.clear()
    codes = f"--codes_dir {tmp_path / 'codes'} --tasks ->text"
    run("train_vqdit", f"{codes} {tokenizers} {TINY} --output_dir {tmp_path / 'a'}")
    (told,) = [record.message for record in caplog.records if "are cut" in record.message]
    assert f"{str(tmp_path / 'codes')!r}, when it was encoded: 2 of " in told


def test_new_labels_are_added_to_a_pretrained_pipeline(run, tokenizers, picture_folder, tmp_path):
    data = f"--train_data_dir {picture_folder} --label_column label --tasks label->image,->image"
    run("train_vqdit", f"{data} {tokenizers} {TINY} --output_dir {tmp_path / 'base'}")
    change_rows(picture_folder, lambda index, row: {"label": "oval"} if index == 3 else {})
    tuned = f"{data} --pretrained_model_name_or_path {tmp_path / 'base'} {FINETUNE} --learning_rate 0"
    run("train_vqdit", f"{tuned} --output_dir {tmp_path / 'mine'}")
    base, mine = (VQDiTPipeline.from_pretrained(tmp_path / name) for name in ("base", "mine"))
    assert base.config.labels == ["round", "square"] and mine.config.labels == ["round", "square", "oval"]
    masked, labels = {"image": torch.full((2, 4, 4), 32)}, {"label": torch.tensor([[0], [1]])}
    with torch.no_grad():  # the learning rate was zero
        before, after = (pipe.transformer(masked, given=labels).sample["image"] for pipe in (base, mine))
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match=r"the labels \['oval'\] are new to the pipeline; a LoRA can't add them"):
        run("train_vqdit", f"{tuned} --rank 2 --output_dir {tmp_path / 'lora'}")


def test_codes_of_other_tokenizers_are_refused(run, tokenizers, image_vq, picture_folder, tmp_path):
    data = f"--train_data_dir {picture_folder} --label_column label"
    run("encode_dataset", f"{data} {tokenizers} --output_dir {tmp_path / 'codes'}")
    run("train_vqdit", f"{data} {tokenizers} {TINY} --tasks label->image --output_dir {tmp_path / 'base'}")
    codes = f"--codes_dir {tmp_path / 'codes'} --tasks label->image --output_dir {tmp_path / 'x'}"
    run("train_vqdit", f"{codes} --pretrained_model_name_or_path {tmp_path / 'base'} {FINETUNE}")
    with torch.no_grad():
        image_vq.encoder.conv_in.bias[0] += 1
    image_vq.save_pretrained(tmp_path / "image_vq")
    with pytest.raises(ValueError, match="made by another image_vq than the one given"):
        run("train_vqdit", f"{codes} {tokenizers} {TINY}")


def test_labels_of_codes_and_of_the_data_itself_train_alike(run, tokenizers, picture_folder, tmp_path):
    """Some of the pretrained pipeline's, in another order, and a new one: codes know nothing of its own."""
    data = f"--train_data_dir {picture_folder} --label_column label"
    run("train_vqdit", f"{data} {tokenizers} {TINY} --tasks label->image --output_dir {tmp_path / 'base'}")
    change_rows(picture_folder, lambda index, row: {"label": "oval" if index % 2 else "square"})
    run("encode_dataset", f"{data} {tokenizers} --output_dir {tmp_path / 'codes'}")
    assert CodeDataset(tmp_path / "codes").labels == ["oval", "square"]
    tuned = f"--pretrained_model_name_or_path {tmp_path / 'base'} --tasks label->image,image->label {FINETUNE}"
    run("train_vqdit", f"{data} {tuned} --output_dir {tmp_path / 'a'}")
    run("train_vqdit", f"--codes_dir {tmp_path / 'codes'} {tuned} --output_dir {tmp_path / 'b'}")
    one, other = (VQDiTPipeline.from_pretrained(tmp_path / name) for name in "ab")
    assert one.config.labels == other.config.labels == ["round", "square", "oval"]
    assert model_fingerprint(one.transformer) == model_fingerprint(other.transformer)
    used = [(tmp_path / name / "README.md").read_text() for name in ("base", "a")]
    assert "| `optimizer` | `muon` |" in used[0] and "| `optimizer` | `adamw` |" in used[1]


def test_a_pipeline_has_names_of_the_labels_that_it_knows_alone(run, tokenizers, picture_folder, tmp_path):
    """Labels that its data had, and no task, are none of its own."""
    data = f"--train_data_dir {picture_folder} --label_column label"
    run("encode_dataset", f"{data} {tokenizers} --output_dir {tmp_path / 'labelled'}")
    first = f"--codes_dir {tmp_path / 'labelled'} {tokenizers} {TINY} --tasks text->image"
    run("train_vqdit", f"{first} --output_dir {tmp_path / 'base'}")
    assert VQDiTPipeline.from_pretrained(tmp_path / "base").config.labels == []
    change_rows(picture_folder, lambda index, row: {"label": ["dot", "box"][index % 2]})
    run("encode_dataset", f"{data} {tokenizers} --output_dir {tmp_path / 'codes'}")
    tuned = f"--pretrained_model_name_or_path {tmp_path / 'base'} --tasks label->image {FINETUNE}"
    run("train_vqdit", f"--codes_dir {tmp_path / 'codes'} {tuned} --output_dir {tmp_path / 'mine'}")
    mine = VQDiTPipeline.from_pretrained(tmp_path / "mine")
    assert (
        sorted(mine.config.labels) == ["box", "dot"] and mine.transformer.config.segments["label"]["vocab_size"] == 2
    )


@pytest.mark.parametrize("source", ["data", "codes"])
@pytest.mark.parametrize("labels", [["round", "square"], ["square", "round"], ["round", "square", "oval"]])
def test_a_pipeline_with_fewer_names_than_codes_is_finetuned(
    run, pipeline, tokenizers, picture_folder, tmp_path, source, labels
):
    names = VQDiTPipeline(**pipeline.components, id2label={0: "round", 1: "square"})
    names.save_pretrained(tmp_path / "base")
    change_rows(picture_folder, lambda index, row: {"label": labels[index % len(labels)]})
    data = f"--train_data_dir {picture_folder} --label_column label"
    if source == "codes":
        run("encode_dataset", f"{data} {tokenizers} --output_dir {tmp_path / 'codes'}")
        data = f"--codes_dir {tmp_path / 'codes'}"
    tuned = f"--pretrained_model_name_or_path {tmp_path / 'base'} --tasks label->image {FINETUNE}"
    run("train_vqdit", f"{data} {tuned} --output_dir {tmp_path / 'mine'}")
    mine = VQDiTPipeline.from_pretrained(tmp_path / "mine")
    assert mine.config.labels == ["round", "square", *labels[2:]]
    assert mine.transformer.config.segments["label"]["vocab_size"] == 3


@pytest.mark.parametrize("labels", [["square", "round"], ["round", "square", "oval"]])
def test_codes_of_older_versions_take_the_pipelines_labels(run, tokenizers, picture_folder, tmp_path, labels):
    """Their index doesn't say what a segment is."""
    data = f"--train_data_dir {picture_folder} --label_column label"
    run("train_vqdit", f"{data} {tokenizers} {TINY} --tasks label->image --output_dir {tmp_path / 'base'}")
    change_rows(picture_folder, lambda index, row: {"label": labels[index % len(labels)]})
    run("encode_dataset", f"{data} {tokenizers} --output_dir {tmp_path / 'codes'}")
    file = tmp_path / "codes" / "segments.json"
    index = json.loads(file.read_text())
    index["segments"] = {n: {k: one[k] for k in ("vocab_size", "shape")} for n, one in index["segments"].items()}
    file.write_text(json.dumps({**index, "labels": labels}))
    assert CodeDataset(tmp_path / "codes").entries.get("label", {}) == {}
    codes = f"--codes_dir {tmp_path / 'codes'} --tasks label->image,image->label --output_dir {tmp_path / 'mine'}"
    run("train_vqdit", f"{codes} --pretrained_model_name_or_path {tmp_path / 'base'} {FINETUNE}")
    mine = VQDiTPipeline.from_pretrained(tmp_path / "mine")
    assert mine.config.labels == ["round", "square", *labels[2:]]


def test_tokenizers_are_found_where_people_have_them(pipeline, tokenizers, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipe")
    # The cache of the Hub as it is after a download; nothing else is asked here.
    hub = tmp_path / "hub" / "models--someone--pipe"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    pipeline.save_pretrained(hub / "snapshots" / ("0" * 40))
    image, text = model_fingerprint(pipeline.image_vq), model_fingerprint(pipeline.text_vq)
    for name in [tmp_path / "pipe", tmp_path / "pipe" / "{}", "someone/pipe", "someone/pipe/{}"]:
        options = {"cache_dir": str(tmp_path / "hub")}
        assert model_fingerprint(load_image_vq(str(name).format("image_vq"), **options)) == image
        model, tokenizer = load_text_vq(str(name).format("text_vq"), **options)
        assert model_fingerprint(model) == text and tokenizer.get_vocab() == pipeline.tokenizer.get_vocab(), name
    load_text_vq(str(tmp_path / "text_vq"))  # a folder of train_text_vq.py
    pipeline.text_vq.save_pretrained(tmp_path / "lone" / "model")
    with pytest.raises(ValueError, match="lone/model' has no tokenizer"):
        load_text_vq(str(tmp_path / "lone" / "model"))


def load_flag(text):
    load_tokenizers([segment_flag(text)], {})


LOADERS = {  # by what is said of a name first
    "codec='{}' is no audio codec that": lambda name: load_codec(name, argument="codec"),
    "image_vq='{}' is no image tokenizer that": load_image_vq,
    "text_vq='{}' is no text tokenizer that": load_text_vq,
}


@pytest.mark.parametrize("said", [*LOADERS, *(f"--segment s={kind}:column:{{}}: its" for kind in ("audio", *MODELS))])
@pytest.mark.parametrize("name", ["user/none", "missing/below/it", "empty", "broken", "text_vq"])
def test_a_name_that_is_not_of_such_a_model_is_told_with_its_argument(said, name, tmp_path, text_vq):
    text_vq.save_pretrained(tmp_path / "text_vq")  # without its tokenizer
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    name = name if name == "user/none" else str(tmp_path / name)
    load = LOADERS.get(said) or (lambda name: load_flag(said.format(name).removeprefix("--segment ")[:-5]))
    with pytest.raises(ValueError, match=f"^{re.escape(said.format(name))} .*be loaded: "):
        load(name)


def test_scripts_tell_the_flag_of_a_codec_that_is_none(run, picture_folder, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 11025)
    for script, flag in (("train_audio_vq", "pretrained_model_name_or_path"), ("evaluate_tokenizer", "tokenizer")):
        output = f"--output_dir {tmp_path / 'run'}" if script == "train_audio_vq" else ""
        with pytest.raises(ValueError, match=f"^{flag}='user/none' .*be loaded: "):
            run(script, f"--train_data_dir {tmp_path} --{flag} user/none {output}")
    for script in ("train_image_vq", "train_text_vq"):
        with pytest.raises(ValueError, match="^pretrained_model_name_or_path='user/none' .*be loaded: "):
            flags = (
                f"--pretrained_model_name_or_path user/none --validation_split none --output_dir {tmp_path / 'run'}"
            )
            run(script, f"--train_data_dir {picture_folder} {flags}")


@pytest.mark.parametrize("name", ["image_vq", "text_vq"])
def test_data_without_a_test_split(run, picture_folder, tmp_path, caplog, monkeypatch, name):
    caplog.set_level(logging.WARNING)
    small = "--block_out_channels 8 8 --norm_num_groups 4 --latent_channels 4 --num_vq_embeddings 8 --resolution 16"
    if name == "text_vq":
        small = "--tokenizer_vocab_size 300 --hidden_size 8 --num_codes 16"
        change_rows(picture_folder, lambda index, row: {"text": [row["text"], "second"]})
    arguments = f"--train_data_dir {picture_folder} {small} {FINETUNE} --output_dir {tmp_path / 'out'}"
    run(f"train_{name}", arguments)
    assert "no test split, only ['train']: measuring on training data" in caplog.text
    assert "train" in (tmp_path / "out" / "README.md").read_text()

    def refuse(*args, **kwargs):
        raise AssertionError("decoded before the check")

    monkeypatch.setattr("diffusers_vqdit.training.data.decode_image", refuse)
    with pytest.raises(ValueError, match=r"validation_split='dev' is not in the data: it has \['train'\]"):
        run(f"train_{name}", f"{arguments} --validation_split dev")


def test_a_pipeline_of_diffusers_is_finetuned(run, picture_folder, tmp_path):
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=2,
        norm_num_groups=4,
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(tmp_path / "dit")
    index = tmp_path / "dit" / "model_index.json"  # where the published ones have their labels
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"0": "round, circle", "1": "square"}}))
    change_rows(picture_folder, lambda index, row: {"label": ["circle", "square", "oval"][index % 3]})
    run(
        "train_latent_dit",
        f"--pretrained_model_name_or_path {tmp_path / 'dit'} --train_data_dir {picture_folder} --label_column label "
        f"--objective epsilon --learn_sigma --learning_rate 0 {FINETUNE} --output_dir {tmp_path / 'out'}",
    )
    pipe = VQDiTLatentPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.transformer, VQDiTTransformer2DModel)
    assert pipe.labels == {"round, circle": 0, "round": 0, "circle": 0, "square": 1, "oval": 2}
    latents, times = torch.randn(3, 4, 4, 4), torch.tensor([1, 500, 999])
    with torch.no_grad():
        before = transformer(latents, times, torch.tensor([0, 1, 2])).sample
        after = pipe.transformer(latents, times, torch.tensor([0, 1, 3])).sample
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_latents_are_kept_for_the_same_pictures_only(run, tokenizers, picture_folder, tmp_path, caplog):
    change_rows(picture_folder, lambda index, row: {"text": ["a dot", "word " * 30]})
    file = tmp_path / "kept" / "latents.safetensors"
    arguments = (
        f"--train_data_dir {picture_folder} --caption_columns text {tokenizers} {TINY} --patch_size 1 "
        f"--latents_file {file} --output_dir {tmp_path / 'out'}"
    )
    run("train_latent_dit", arguments)
    written = file.stat().st_mtime_ns
    run("train_latent_dit", arguments)
    assert file.stat().st_mtime_ns == written
    assert "10 of 20 captions have more than max_length=12 tokens" in caplog.text
    with pytest.raises(ValueError, match="was made with other random_flip; delete it"):
        run("train_latent_dit", f"{arguments} --random_flip")
    Image.new("RGB", (32, 32), "black").save(picture_folder / "3.png")
    with pytest.raises(ValueError, match="was made with other pictures; delete it"):
        run("train_latent_dit", arguments)


@pytest.mark.parametrize("script_name", ["encode_dataset", "train_latent_dit", "train_image_vq"])
def test_a_resolution_between_codes_is_refused_before_the_work(run, tokenizers, picture_folder, tmp_path, script_name):
    """The tiny tokenizer's codes are 4 pixels wide."""
    data = f"--train_data_dir {picture_folder} --output_dir {tmp_path / 'run'} --resolution 30"
    more = {"encode_dataset": tokenizers, "train_latent_dit": f"--image_vq {tmp_path / 'image_vq'} {TINY}"}
    more["train_image_vq"] = "--block_out_channels 8 8 8 --norm_num_groups 2 --report_to none --max_train_steps 1"
    with pytest.raises(
        ValueError, match=r"resolution: \[30, 30\] must be a multiple of \[4, 4\].* such as \[32, 32\]"
    ):
        run(script_name, f"{data} {more[script_name]}")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name not in (".lock", "logs")]


@pytest.mark.parametrize("streaming", ["", "--streaming"])
def test_pictures_are_read_in_the_channels_of_the_tokenizer(run, picture_folder, tmp_path, streaming):
    """A grey one is finetuned, measured, and gives the latents of a DiT."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    size = {"block_out_channels": (4, 8), "norm_num_groups": 2, "sample_size": 16, "num_vq_embeddings": 16}
    grey = ImageVQModel(in_channels=1, out_channels=1, **kinds, **size)
    grey.save_pretrained(tmp_path / "grey")
    common = f"--train_batch_size 4 --max_train_steps 2 --resolution 16 --report_to none {streaming}"
    pictures = load_dataset("imagefolder", data_dir=str(picture_folder), split="train", cache_dir=str(tmp_path / "c"))
    pictures.to_parquet(str(tmp_path / "pictures.parquet"))
    data = f"--dataset_name {tmp_path / 'pictures.parquet'}"
    tuned = tmp_path / "tuned"
    run("train_image_vq", f"{common} {data} --pretrained_model_name_or_path {tmp_path / 'grey'} --output_dir {tuned}")
    assert ImageVQModel.from_pretrained(tuned).config.in_channels == 1
    run("evaluate_tokenizer", f"--tokenizer {tuned} {data} --split train --output_file {tmp_path / 'figures.json'}")
    latents = f"{common} {data} --image_vq {tuned} --num_layers 1 --num_attention_heads 2 --attention_head_dim 8"
    run("train_latent_dit", f"{latents} --output_dir {tmp_path / 'latent'}")
    pipe = VQDiTLatentPipeline.from_pretrained(tmp_path / "latent")
    assert pipe(num_inference_steps=1, output_type="pt", guidance_scale=1.0).images.shape == (1, 1, 16, 16)
