"""Columns of ready codes through the public scripts: of videos by diffusers' tokenizer, and of any shape."""

import warnings

import pytest
import torch

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.training.codes import CodeDataset


TINY = "--num_layers 1 --num_attention_heads 2 --attention_head_dim 8 --report_to none --train_batch_size 2"
TINY += " --max_train_steps 2"


@pytest.fixture(scope="module")
def vidtok():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        options = {"ch": 32, "num_res_blocks": 1, "z_channels": 3, "codebook_size": 512, "double_z": False}
        torch.manual_seed(0)
        return diffusers.AutoencoderVidTok(ch_mult=[1, 1, 1, 1], regularizer="fsq", **options).eval()


@pytest.fixture
def clips(vidtok, tmp_path):
    """Codes (N, 2, 4, 4) of clips of 9 frames of 32 px, in a parquet file: nested, and flat; and their captions."""
    datasets = pytest.importorskip("datasets")
    videos = 2 * torch.rand(6, 3, 9, 32, 32) - 1
    with torch.no_grad():
        codes = vidtok.encode(videos)[1].long()
    assert codes.shape == (6, 2, 4, 4)
    rows = {"codes": codes.tolist(), "flat": codes.flatten(1).tolist(), "text": ["a red apple", "a blue box"] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "clips.parquet"))
    return codes


@pytest.mark.parametrize("column", ["codes", "flat:2x4x4:512"])
@pytest.mark.parametrize("patch", ["", "--patch video=1x2x2"])
def test_videos(run, clips, vidtok, text_vq, tokenizer, tmp_path, column, patch):
    text_vq.save_pretrained(tmp_path / "text_vq")
    tokenizer.save_pretrained(tmp_path / "text_vq" / "tokenizer")
    source = f"--dataset_name {tmp_path / 'clips.parquet'} --code_columns video={column}"
    data = f"{source} --text_vq {tmp_path / 'text_vq'}"
    run("encode_dataset", f"{data} --output_dir {tmp_path / 'codes'}")
    codes, size = CodeDataset(tmp_path / "codes"), 512 if ":" in column else int(clips.max()) + 1
    assert codes.segments["video"] == {"vocab_size": size, "shape": [2, 4, 4]}
    assert codes.entries["video"] == {"modality": "codes"} and torch.equal(codes.codes["video"].long(), clips)
    tasks = "--tasks text->video,video->text,->video"
    own = f"--codes_dir {tmp_path / 'codes'} --text_vq {tmp_path / 'text_vq'}"
    run("train_vqdit", f"{own} {tasks} {patch} {TINY} --output_dir {tmp_path / 'out'}")
    run("train_vqdit", f"{data} {tasks} {patch} {TINY} --output_dir {tmp_path / 'again'}")  # encoded at the start
    pipe, again = (VQDiTPipeline.from_pretrained(tmp_path / name) for name in ("out", "again"))
    pairs = zip(pipe.transformer.parameters(), again.transformer.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert pipe.transformer.config.segments["video"].get("patch") == ([1, 2, 2] if patch else None)
    drawn = pipe("a red apple", num_images_per_prompt=2, num_inference_steps=4)
    assert drawn.images is None and drawn.segments["video"].shape == (2, 2, 4, 4)
    with torch.no_grad():
        frames = vidtok.decode(drawn.segments["video"], decode_from_indices=True)
    assert frames.shape[:2] == (2, 3) and frames.shape[3:] == (32, 32) and frames.isfinite().all()
    begun = drawn.segments["video"].clone()
    begun[:, 1] = size
    continued = pipe(inputs={"video": begun}, output="video", num_inference_steps=4).segments["video"]
    assert torch.equal(continued[:, 0], begun[:, 0]) and continued.max() < size
    assert len(pipe(inputs={"video": begun[:, :1].repeat(1, 2, 1, 1)}, output="text").texts) == 2
    # Finetuned, with what the pipeline knows of the codes.
    tuned = f"--pretrained_model_name_or_path {tmp_path / 'out'} --report_to none --train_batch_size 2"
    run("train_vqdit", f"{tuned} --max_train_steps 1 {source} {tasks} --output_dir {tmp_path / 'tuned'}")
    assert VQDiTPipeline.from_pretrained(tmp_path / "tuned").config.segments["video"] == {"modality": "codes"}


def test_a_row_of_another_shape_is_named(run, clips, tmp_path):
    data = f"--dataset_name {tmp_path / 'clips.parquet'} --output_dir {tmp_path / 'codes'}"
    for column, message in [
        ("flat:2x4x3", r"column 'flat', row 0: must be lists of whole codes of shape \[2, 4, 3\]"),
        ("codes::3", r"column 'codes', row \d: the code \d+ must be in \[0, 3\): give a larger num_codes \(SIZE of"),
        ("none", "column 'none' is not in the data"),
        ("text", "column 'text', row 0: must be lists of whole codes"),
    ]:
        with pytest.raises(ValueError, match=message):
            run("encode_dataset", f"{data} --code_columns video={column.replace('::', ':2x4x4:')}")


def test_a_task_of_a_segment_that_is_not_encoded_says_how_to(run, clips, tmp_path):
    data = f"--dataset_name {tmp_path / 'clips.parquet'} --code_columns video=codes --output_dir {tmp_path / 'codes'}"
    run("encode_dataset", data)
    with pytest.raises(ValueError, match=r"need the segments \['sketch'\]; .* --segment sketch=MODALITY:COLUMN"):
        run(
            "train_vqdit",
            f"--codes_dir {tmp_path / 'codes'} --code_columns video --tasks sketch->video {TINY} "
            f"--output_dir {tmp_path / 'out'}",
        )
