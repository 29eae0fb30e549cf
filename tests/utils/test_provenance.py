"""Generated pictures say that they are."""

from xml.etree import ElementTree

import pytest
from PIL import Image

from diffusers_vqdit import __main__
from diffusers_vqdit.utils.provenance import COMPOSITE, GENERATED, digital_source_type, save_generated


def test_a_saved_picture_carries_where_it_comes_from(tmp_path):
    picture = Image.effect_noise((16, 16), 50).convert("RGB")
    save_generated(picture, tmp_path / "a.png", model_id="me/model<1>", description="红苹果 & more")
    assert digital_source_type(tmp_path / "a.png") == GENERATED
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.tobytes() == picture.tobytes()
        assert saved.text["Description"] == "红苹果 & more"
        assert "me/model<1>" in saved.text["Software"] and "synthetic" in saved.text["Disclaimer"]
        packet = ElementTree.fromstring(saved.text["XML:com.adobe.xmp"])
    iptc, xmp = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}", "{http://ns.adobe.com/xap/1.0/}"
    assert packet.find(f".//{iptc}DigitalSourceType").text == GENERATED
    assert "me/model<1>" in packet.find(f".//{xmp}CreatorTool").text

    save_generated(picture, tmp_path / "b.png", model_id="m", composite=True)
    assert digital_source_type(tmp_path / "b.png") == COMPOSITE
    picture.save(tmp_path / "c.png")
    assert digital_source_type(tmp_path / "c.png") is None


def test_formats_without_the_metadata_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a.jpg.*must end in .png"):
        save_generated(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", model_id="m")


def test_the_demo_marks_its_pictures(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipe")
    arguments = f"--pretrained_model_name_or_path {tmp_path / 'pipe'} --prompt apple --num_inference_steps 2"
    __main__.main(__main__.parse_args([*arguments.split(), "--output_file", str(tmp_path / "demo.png")]))
    assert digital_source_type(tmp_path / "demo.png") == GENERATED
