"""The examples that nothing else runs, with fewer steps than they need."""

import subprocess
import sys

import pytest
import soundfile

from diffusers_vqdit.utils.provenance import GENERATED, digital_source_type


@pytest.mark.slow
def test_your_own_voice(root, audio_codecs, tmp_path):
    """A folder of recordings in, a pipeline that speaks and listens out, with the codec finetuned first."""
    texts = ["red apple", "snowman", "green heart"]
    folder = audio_codecs.sound_folder(tmp_path / "recordings", count=len(texts))
    lines = ["file_name,text", *(f"{index}.flac,{text}" for index, text in enumerate(texts))]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    command = [sys.executable, root / "examples/your_own_voice.py", "--recordings", folder, "--codec_steps", "1"]
    command += ["--max_train_steps", "2", "--output_dir", tmp_path / "voice", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 WAV files" in done.stdout and "of 3 recordings exactly" in done.stdout
    assert done.stdout.count("heard: ") == 3 and "(snowman)" in done.stdout
    for index in range(3):
        path = tmp_path / "voice" / "spoken" / f"{index}.wav"
        assert soundfile.info(path).samplerate == 11025 and digital_source_type(path) == GENERATED
    assert (tmp_path / "voice" / "codec" / "preprocessor_config.json").is_file()
