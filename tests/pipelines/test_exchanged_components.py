"""A component that is taken away and given back is saved as if it had always been there."""

import json

import pytest

from diffusers_vqdit import VQDiTPipeline


@pytest.mark.parametrize("names", [["image_vq"], ["text_vq", "tokenizer"], ["image_vq", "text_vq", "tokenizer"]])
@pytest.mark.parametrize("from_disk", [False, True])
def test_none_and_back(pipeline, tmp_path, names, from_disk):
    pipeline.save_pretrained(tmp_path / "whole")
    parts = {name: getattr(pipeline, name) for name in names}
    if from_disk:
        pipeline = VQDiTPipeline.from_pretrained(tmp_path / "whole", **dict.fromkeys(names))
    else:
        for name in names:
            setattr(pipeline, name, None)
    pipeline.save_pretrained(tmp_path / "less")
    assert not any((tmp_path / "less" / name).exists() for name in names)
    for name, part in parts.items():
        setattr(pipeline, name, part)
    pipeline.save_pretrained(tmp_path / "back")
    index = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("whole", "back")]
    assert index[0] == {name: value for name, value in index[1].items() if name != "_name_or_path"}
    loaded = VQDiTPipeline.from_pretrained(tmp_path / "back")
    assert all(type(getattr(loaded, name)) is type(part) for name, part in parts.items())
