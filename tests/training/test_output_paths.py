"""Programs that are no training runs: where they write is tried, and theirs alone, before anything is loaded."""

import multiprocessing
import sys
import threading

import pytest

from diffusers_vqdit import __main__ as demo


@pytest.fixture
def odd(tmp_path):
    """Paths that nothing can be written below."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing" / "x")
    return [tmp_path / "file" / "below", tmp_path / "dangling" / "x", "/proc/nothing/x", tmp_path / ("x" * 256) / "x"]


def test_encode_dataset(script, odd, tmp_path, monkeypatch):
    encode = script("encode_dataset")
    monkeypatch.setattr(encode, "load_splits", None)
    (tmp_path / "codes" / "segments.json").mkdir(parents=True)
    for folder in [*odd, tmp_path / "file"]:
        with pytest.raises(ValueError, match="output_dir='.*can't be written"):
            encode.main(encode.parse_args(f"--image_vq x --train_data_dir x --output_dir {folder}".split()))
    with pytest.raises(ValueError, match="has a folder 'segments.json' where a file"):
        encode.main(encode.parse_args(f"--image_vq x --train_data_dir x --output_dir {tmp_path / 'codes'}".split()))


def _encode(encode, arguments, started):
    def wait(**options):
        started.set()
        threading.Event().wait()

    encode.load_splits = wait
    encode.main(encode.parse_args(arguments))


def test_two_that_encode_into_one_folder(script, tmp_path):
    encode = script("encode_dataset")
    arguments = f"--image_vq x --train_data_dir x --output_dir {tmp_path / 'codes'}".split()
    context = multiprocessing.get_context("fork")
    started = context.Event()
    first = context.Process(target=_encode, args=(encode, arguments, started))
    first.start()
    assert started.wait(60)
    with pytest.raises(ValueError, match=f"output_dir='{tmp_path / 'codes'}' is in use: another run"):
        encode.main(encode.parse_args(arguments))
    first.kill()
    first.join()
    with pytest.raises(ValueError, match="train_data_dir='x' is not a folder"):  # the folder is free again
        encode.main(encode.parse_args(arguments))


def test_evaluate(script, odd, tmp_path, monkeypatch):
    evaluate, tokenizer = script("evaluate"), script("evaluate_tokenizer")
    monkeypatch.setattr(evaluate, "VQDiTPipeline", None)
    monkeypatch.setattr(tokenizer, "ImageVQModel", None)
    (tmp_path / "out" / "evaluation.png").mkdir(parents=True)
    for folder in [*odd, tmp_path / "file", tmp_path / "out"]:
        with pytest.raises(ValueError, match="output_dir='.*(can't be written|is no regular file)"):
            arguments = f"--pretrained_model_name_or_path x --output_dir {folder}"
            evaluate.main(evaluate.parse_args(arguments.split()))
    for file in [*odd, tmp_path / "out"]:
        with pytest.raises(ValueError, match="output_file='.*(can't be written|is no regular file)"):
            tokenizer.main(tokenizer.parse_args(f"--tokenizer x --output_file {file}".split()))


def test_prepare_emoji(script, odd, tmp_path, monkeypatch):
    prepare = script("prepare_emoji")
    monkeypatch.setattr(prepare, "open_package", None)
    for file in [*odd, tmp_path]:
        monkeypatch.setattr(sys, "argv", ["prepare_emoji.py", "--output_file", str(file)])
        with pytest.raises(ValueError, match="output_file='.*(can't be written|is no regular file)"):
            prepare.main(prepare.parse_args())


def test_the_demo(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "VQDiTPipeline", None)
    for file in [*(f"{path}.png" for path in odd), tmp_path / "x.jpg", tmp_path]:
        with pytest.raises(ValueError, match="output_file='.*(can't be written|must end in .png)"):
            demo.main(demo.parse_args(["--output_file", str(file)]))


@pytest.mark.parametrize("name", ["encode_dataset", "evaluate"])
def test_devices_that_are_not_here(script, capsys, name):
    required = {"encode_dataset": "--image_vq x --output_dir x", "evaluate": "--pretrained_model_name_or_path x"}[name]
    devices = ["xyz", "cpu0", "cuda:99", "gpu", "0", "meta", "", "cpu:x", "CPU", "cuda:-1", "xla", "mps:7", "1.5"]
    for device in devices:
        with pytest.raises(SystemExit):
            script(name).parse_args([*required.split(), "--device", device])
        told = capsys.readouterr().err
        assert f"argument --device: value={device!r} must be a device that is here, one of ['cpu'" in told
    assert script(name).parse_args([*required.split(), "--device", "cpu"]).device == "cpu"
    print(f"devices that are not here: {len(devices)} refused")


def test_a_font_that_is_none(script, capsys, tmp_path):
    for font in ("nothing.ttf", str(tmp_path)):
        with pytest.raises(SystemExit):
            script("evaluate").parse_args(f"--pretrained_model_name_or_path x --font {font}".split())
        assert f"argument --font: value={font!r} must be a font file" in capsys.readouterr().err
