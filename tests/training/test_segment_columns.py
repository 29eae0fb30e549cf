"""The flags that say which columns become which segments."""

import argparse

import pytest

from diffusers_vqdit.models.image_vq import ImageVQModel
from diffusers_vqdit.models.text_vq import TextVQModel
from diffusers_vqdit.training.segment_columns import code_column, load_tokenizers, segment_flag


@pytest.fixture
def pipeline_folder(image_vq, text_vq, tokenizer, tmp_path):
    """The tokenizers of a pipeline, in its folder."""
    for name, part in (("image_vq", image_vq), ("text_vq", text_vq), ("tokenizer", tokenizer)):
        part.save_pretrained(tmp_path / name)
    return str(tmp_path)


@pytest.mark.parametrize("known", [False, True], ids=["loaded", "there already"])
def test_one_folder_has_a_tokenizer_of_each_modality(known, pipeline_folder, image_vq, text_vq, tokenizer):
    flags = [segment_flag(f"{name}:column:{pipeline_folder}") for name in ("a=image", "b=text", "c=image", "d=text")]
    there = {("image_vq", pipeline_folder): (image_vq, None), ("text_vq", pipeline_folder): (text_vq, tokenizer)}
    found = load_tokenizers(flags, there if known else {})
    assert list(found) == ["a", "b", "c", "d"]
    assert [type(found[name][0]) for name in found] == [ImageVQModel, TextVQModel] * 2
    assert found["a"][0] is found["c"][0] and found["b"] == found["d"]  # each loaded once
    assert (found["a"][0] is image_vq) == known
    assert found["a"][1] is None and found["b"][1].get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("video", ("video", "codes", "video", None, None, None)),
        ("video=c", ("video", "codes", "c", None, None, None)),
        ("video=c d:4x16x16", ("video", "codes", "c d", None, (4, 16, 16), None)),
        ("video=c:12:64", ("video", "codes", "c", None, (12,), 64)),
        *(
            (wrong, None)
            for wrong in ("", "=c", "a-b=c", "9=c", "v=c:2x", "v=c:1x2x3x4", "v=c:0", "v=c:2:0", "forward=c")
        ),
    ],
)
def test_code_column(text, parsed):
    if parsed is None:
        with pytest.raises(argparse.ArgumentTypeError, match="value="):
            code_column(text)
    else:
        assert code_column(text) == parsed
        assert code_column(str(code_column(text)).replace("=codes:", "=", 1)) == parsed
