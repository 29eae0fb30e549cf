"""The demo's ``--say`` and ``--listen``."""

import numpy as np
import pytest
import soundfile
from PIL import Image

from diffusers_vqdit.__main__ import main, parse_args
from diffusers_vqdit.utils import starter
from diffusers_vqdit.utils.provenance import GENERATED, digital_source_type


def test_texts_are_spoken_and_sounds_written_down(talking_pipeline, audio_codecs, tmp_path, capsys):
    talking_pipeline.save_pretrained(tmp_path / "pipe")
    folder = audio_codecs.sound_folder(tmp_path / "sounds", count=2)
    place = ["--pretrained_model_name_or_path", str(tmp_path / "pipe"), "--output_file", str(tmp_path / "demo.png")]
    files = [str(folder / "0.flac"), str(folder / "1.flac")]
    main(parse_args([*place, "--say", "a red apple", "green", "--listen", *files, "--num_inference_steps", "4"]))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 4 and "a red apple" in told[0] and told[2].startswith(f"{files[0]}: ")
    for index in range(2):
        path = tmp_path / f"demo-{index}.wav"
        assert soundfile.info(path).samplerate == audio_codecs.RATE and digital_source_type(path) == GENERATED
    assert not (tmp_path / "demo.png").exists()
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"--listen '.*broken\.wav': .* no sound that can be read"):
        main(parse_args([*place, "--listen", files[0], str(tmp_path / "broken.wav")]))


def test_segments_are_those_of_a_task_that_speaks_or_listens(talking_pipeline, audio_codecs, tmp_path, capsys):
    """Whatever other segments of texts there are, as in a starter that has learned to speak."""
    (sound, text), tasks = ("sound", "text"), talking_pipeline.transformer.config.tasks
    assert f"{text}->{sound}" in tasks and f"{sound}->{text}" in tasks
    silent = [task for task in tasks if task != f"{text}->{sound}"]
    talking_pipeline.transformer.register_to_config(tasks=silent)
    talking_pipeline.save_pretrained(tmp_path / "pipe")
    talking_pipeline.transformer.register_to_config(tasks=tasks)
    place = ["--pretrained_model_name_or_path", str(tmp_path / "pipe"), "--output_file", str(tmp_path / "demo.png")]
    with pytest.raises(ValueError, match="no task that makes audios of texts; it has .*'sound->text'"):
        main(parse_args([*place, "--say", "a red apple"]))
    folder = audio_codecs.sound_folder(tmp_path / "sounds", count=1)
    main(parse_args([*place, "--listen", str(folder / "0.flac"), "--num_inference_steps", "2"]))
    assert "0.flac: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "vqdit-emoji"),
        (["--prompt", "a sailboat"], "vqdit-emoji"),
        (["--say", "a red apple"], "vqdit-talking-emoji"),
        (["--listen", "a.wav"], "vqdit-talking-emoji"),
        (["--say", "a red apple", "--pretrained_model_name_or_path", "you/model"], "you/model"),
        (["--say", "a red apple", "--pretrained_model_name_or_path", str(starter.STARTER)], str(starter.STARTER)),
    ],
)
def test_the_starter_is_one_that_does_what_is_asked(root, arguments, name):
    name = str(root / "model_cards" / name) if name.startswith("vqdit") else name
    assert parse_args(arguments).pretrained_model_name_or_path == name


def test_without_a_pipelines_name_the_talking_starter_speaks_and_listens(root, tmp_path, capsys, monkeypatch):
    """And its files name it without the path of this machine; where it isn't there, as in a wheel, it is said."""
    said, place = tmp_path / "demo-0.wav", ["--output_file", str(tmp_path / "demo.png"), "--num_inference_steps", "8"]
    main(parse_args(["--say", "a red apple", *place]))
    main(parse_args(["--listen", str(said), *place]))
    assert str(said) in (told := capsys.readouterr().out) and f"{said}: " in told.splitlines()[-1]
    assert soundfile.info(said).duration > 0.3
    assert b": vqdit-talking-emoji" in said.read_bytes() and str(root).encode() not in said.read_bytes()
    monkeypatch.setattr("diffusers_vqdit.__main__.TALKING_STARTER", tmp_path / "gone")
    monkeypatch.setattr(starter, "TALKING_STARTER", tmp_path / "gone")
    with pytest.raises(ValueError, match=f"the starter checkpoint is not at {tmp_path / 'gone'}"):
        main(parse_args(["--say", "a red apple", *place]))


def test_a_sound_is_found_by_its_text(talking_pipeline, audio_codecs):
    talking_pipeline.set_progress_bar_config(disable=True)
    sounds = [audio_codecs.tone(0.05 + 0.02 * index) for index in range(3)]
    gallery = talking_pipeline.index(inputs={"sound": sounds}, query="text")
    assert len(gallery) == 3
    found = talking_pipeline.retrieve("a red apple", gallery, top_k=3)
    assert found.indices.sort().values.tolist() == [[0, 1, 2]]
    drawn = talking_pipeline("a red apple", inputs={"sound": sounds[0]}, output="sound", mask_image=np.array([0, 1]))
    assert np.array_equal(drawn.audios[0][: len(sounds[0]) // 2], sounds[0][: len(sounds[0]) // 2])


def test_a_demo_shows_captions_of_the_pictures_alone_and_only_what_it_knows(make_pipeline, tmp_path, capsys):
    pipe = make_pipeline(0)
    place = ["--pretrained_model_name_or_path", str(tmp_path / "pipe"), "--output_file", str(tmp_path / "demo.png")]
    (tmp_path / "pipe/examples").mkdir(parents=True)
    (tmp_path / "pipe/examples/captions.json").write_text('{"0.wav": "a dog", "0.png": "a cat"}')
    Image.new("RGB", (16, 16)).save(tmp_path / "pipe/examples/0.png")
    for tasks, count in ((["text->image", "image->text"], 13), (["text->image"], 12)):
        pipe.transformer.register_to_config(tasks=tasks)
        pipe.save_pretrained(tmp_path / "pipe")
        main(parse_args([*place, "--num_inference_steps", "1"]))
        assert f": {count} pictures" in capsys.readouterr().out


def test_where_sounds_are_written_their_files_are_checked_and_no_picture_s(talking_pipeline, tmp_path):
    talking_pipeline.save_pretrained(tmp_path / "pipe")
    place = ["--pretrained_model_name_or_path", str(tmp_path / "pipe"), "--say", "green", "--num_inference_steps", "1"]
    main(parse_args([*place, "--output_file", str(tmp_path / "hi.wav")]))
    assert (tmp_path / "hi-0.wav").is_file()
    (tmp_path / "no-0.wav").mkdir()
    with pytest.raises(ValueError, match="output_file=.*no-0.wav' is no regular file"):
        main(parse_args([*place, "--output_file", str(tmp_path / "no.wav")]))
