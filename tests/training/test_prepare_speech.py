"""The dataset of spoken captions: what is held out is held out; and the folder of Tux Paint's stamps as a table."""

import io
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile
from datasets import Audio, load_dataset
from PIL import Image


@pytest.fixture
def prepare(script, root, tmp_path, monkeypatch):
    """Make the table with arguments, and read it; voices are tones of their own."""
    module = script("prepare_speech")

    def speak(text, voice, speed, pitch):
        time = np.arange(220 + 22 * len(text)) / 2205
        return {"array": 0.5 * np.sin(2 * np.pi * (200 + speed + pitch / 100) * time), "sampling_rate": 2205}

    monkeypatch.setattr(module, "speak", speak)

    def prepare(arguments):
        path = tmp_path / "speech.parquet"
        captions = "" if "--stamps_dir" in arguments else f"--emoji_file {root / 'training/data/emoji.parquet'}"
        module.main(module.parse_args(f"{captions} --output_file {path} {arguments}".split()))
        table = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        for name in {"audio", "speech"} & set(table.column_names):
            table = table.cast_column(name, Audio(decode=False))
        return table

    return prepare


def test_what_is_held_out_is_not_in_training(prepare, script):
    table, voices = prepare("--max_captions 400 --sampling_rate 1000"), script("prepare_speech").VOICES
    rows = [
        dict(zip(names, values, strict=True))
        for names in [("text", "voice", "language", "split", "held_out", "emoji")]
        for values in zip(*(table[name] for name in names), strict=True)
    ]
    train = [row for row in rows if row["split"] == "train"]
    known, pairs = defaultdict(set), {(row["text"], row["voice"]) for row in train}
    said = {}
    for text, language, speech in zip(table["text"], table["language"], table["speech"], strict=True):
        # One recording a caption, in whatever voice it was heard, which is none of the test split's.
        assert said.setdefault((language, text), speech["bytes"]) == speech["bytes"]
    own = zip(table["held_out"], table["audio"], table["speech"], strict=True)
    assert len(said) > 300 and all(heard["bytes"] != speech["bytes"] for kind, heard, speech in own if kind == "pair")
    for row in train:
        assert row["held_out"] == "" and row["voice"] != voices[row["language"]][-1][0]
        known[row["text"]].add(row["voice"])
    counts = Counter(row["held_out"] for row in rows)
    assert set(counts) == {"", "pair", "voice", "composition", "picture"} and counts["pair"] > 10
    assert {row["voice"] for row in train} == {voice for every in voices.values() for voice, _ in every[:4]}
    for row in rows:
        if row["held_out"]:
            assert row["split"] == "test"
        if row["held_out"] in ("pair", "voice"):
            assert known[row["text"]] and (row["text"], row["voice"]) not in pairs
        if row["held_out"] == "voice":
            assert row["voice"] == voices[row["language"]][-1][0]
    with pytest.raises(ValueError, match=r"labels=\['fruit'\] are none of .*, whose are \['activities', "):
        prepare("--labels fruit activities")
    some = prepare("--labels activities flags --max_captions 90 --sampling_rate 1000")
    assert set(some["label"]) == {"activities", "flags"} and len(set(some["emoji"])) == 90
    with io.BytesIO(table[0]["audio"]["bytes"]) as file:
        header = soundfile.info(file)
    assert (header.samplerate, header.channels, header.format) == (1000, 1, "FLAC")
    assert table[0]["image"].size == (64, 64)


@pytest.mark.parametrize("number", [4, 7, 12])
def test_a_caption_is_said_in_as_many_voices_as_asked_for(prepare, script, number):
    table = prepare(f"--voices_per_caption {number} --max_captions 40 --sampling_rate 1000")
    voices = {language: [voice for voice, _ in every] for language, every in script("prepare_speech").VOICES.items()}
    assert all(len(set(every)) == len(every) for every in voices.values())
    said, pairs = defaultdict(list), Counter()
    for text, voice, language, held_out in zip(
        table["text"], table["voice"], table["language"], table["held_out"], strict=True
    ):
        if voice != voices[language][-1]:
            said[language, text].append(voice)
            pairs[language, text] += held_out == "pair"
    for (language, _), by in said.items():
        assert sorted(by) == sorted(voices[language][:number])
    assert max(pairs.values()) == 1
    with pytest.raises(SystemExit):
        prepare("--voices_per_caption 13")


def test_renditions_differ_in_speed_and_pitch_and_hold_out_what_the_first_holds_out(prepare, script):
    once, thrice = (prepare(f"--renditions {number} --max_captions 40 --sampling_rate 1000") for number in (1, 3))
    rows = [
        Counter(
            (text, voice, held_out)
            for text, voice, held_out in zip(table["text"], table["voice"], table["held_out"], strict=True)
        )
        for table in (once, thrice)
    ]
    assert {key: 1 if key[2] else 3 for key in rows[0]} == rows[1]
    sounds = defaultdict(list)
    for text, voice, audio in zip(thrice["text"], thrice["voice"], thrice["audio"], strict=True):
        sounds[text, voice].append(audio["bytes"])
    assert all(len(set(every)) == len(every) for every in sounds.values())
    assert {audio["bytes"] for audio in once["audio"]} <= {audio["bytes"] for audio in thrice["audio"]}
    manners = [script("prepare_speech").manner("a cat", "en-us", 160, rendition) for rendition in range(200)]
    assert manners[0] == ("en-us", 160, 50)
    assert all(136 <= speed <= 184 and 25 <= pitch <= 75 for _, speed, pitch in manners)
    assert len(set(manners)) > 180


def test_the_unheard_voice_may_say_all_that_training_says(prepare, script):
    """In the test split alone, and all other rows stay as they are."""
    voices = script("prepare_speech").VOICES
    names = ("text", "voice", "language", "split", "held_out")
    found = {}
    for share in (0, 0.04, 0.3, 1):
        table = prepare(f"--unheard_voice_share {share} --max_captions 60 --sampling_rate 1000")
        found[share] = [
            (*row, heard["bytes"], said["bytes"])
            for *row, heard, said in zip(*(table[name] for name in (*names, "audio", "speech")), strict=True)
        ]
    usual = prepare("--max_captions 60 --sampling_rate 1000")
    assert [row[:5] for row in found[0.04]] == list(zip(*(usual[name] for name in names), strict=True))
    others = {share: [row for row in rows if row[4] != "voice"] for share, rows in found.items()}
    unheard = {share: [row for row in rows if row[4] == "voice"] for share, rows in found.items()}
    assert others[0] == others[0.04] == others[0.3] == others[1]
    assert not unheard[0] and set(unheard[0.04]) < set(unheard[0.3]) < set(unheard[1])
    assert all(row[3] == "test" and row[1] == voices[row[2]][-1][0] for row in unheard[1])
    trained = {(row[0], row[2]) for row in others[1] if row[3] == "train"}
    assert {(row[0], row[2]) for row in unheard[1]} == trained and len(trained) > 80


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
@pytest.mark.parametrize(("text", "voice"), [("red apple", "en-us"), ("红苹果", "cmn+f3"), ("-v", "en-gb+m3")])
def test_espeak_says_a_text(script, text, voice):
    speak = script("prepare_speech").speak
    said = speak(text, voice, 160, 50)
    samples, rate = said["array"], said["sampling_rate"]
    assert rate == 22050 and samples.ndim == 1 and 0.3 < len(samples) / rate < 3
    assert 0.01 < np.sqrt(np.square(samples).mean()) and np.abs(samples).max() <= 1
    assert np.abs(samples[:20]).max() < 0.1  # no header that would be heard as a click
    assert np.array_equal(samples, speak(text, voice, 160, 50)["array"])
    slow, high = speak(text, voice, 110, 50)["array"], speak(text, voice, 160, 90)["array"]
    assert len(slow) > 1.15 * len(samples) and not np.array_equal(high[: len(samples)], samples[: len(high)])


def test_stamps_are_read_with_their_captions(prepare, tmp_path, capsys):
    folder = tmp_path / "stamps" / "animals"
    folder.mkdir(parents=True)
    for index in range(30):
        name = f"dog{index}"
        (folder / f"{name}.txt").write_text(f"A dog {index}.\nes.utf8=Un perro {index}. \nfr.utf8=Un chien\n")
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        for ending in ("_desc.ogg", "_desc_es.ogg", "_desc_de.ogg", ".ogg"):  # the last is a sound effect
            soundfile.write(folder / f"{name}{ending}", np.sin(np.arange(800) / 5), 8000)
    (folder / "dog0_desc_es.ogg").write_bytes(b"broken")
    table = prepare(f"--stamps_dir {tmp_path / 'stamps'} --languages en es de --sampling_rate 4000")
    assert "1 could not be read" in capsys.readouterr().out
    assert Counter(table["language"]) == {"en": 30, "es": 29}  # without captions in German
    assert set(table["label"]) == {"animals"} and table[0]["image"].size == (8, 8)
    assert {text for text, language in zip(table["text"], table["language"], strict=True) if language == "es"} == {
        f"Un perro {index}." for index in range(1, 30)
    }
    splits = defaultdict(set)
    for name, split in zip(table["emoji"], table["split"], strict=True):
        splits[name].add(split)
    assert all(len(found) == 1 for found in splits.values()) and set.union(*splits.values()) == {"train", "test"}
    named = f"--stamps_dir {tmp_path / 'stamps'} --languages es --sampling_rate 4000"
    rows, effects = prepare(named), prepare(f"{named} --sound_effects")
    assert Counter(effects["language"]) == {"es": 29, "effect": 30} and effects[:29]["text"] == rows["text"]
    assert set(effects[29:]["voice"]) == {"sound effect"} and effects[29]["image"].size == (8, 8)
    assert set(effects[29:]["text"]) == {f"A dog {index}." for index in range(30)}
    for name, split in zip(effects["emoji"], effects["split"], strict=True):
        assert splits[name] == {split}
    with pytest.raises(ValueError, match="has no recordings of captions"):
        prepare(f"--stamps_dir {tmp_path / 'stamps'} --languages tlh")
    (folder / "cat.txt").write_text("")  # without a caption
    soundfile.write(folder / "cat_desc_es.ogg", np.sin(np.arange(800) / 5), 8000)
    assert prepare(f"{named} --max_captions 3")["text"] == rows["text"][:2]  # the first can't be read


def test_other_languages_are_refused(prepare):
    with pytest.raises(SystemExit):
        prepare("--languages fr")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sound_effects", "--sound_effects=True has no effect without --stamps_dir"),
        ("--stamps_dir x --unheard_voice_share 0.5", "--unheard_voice_share=0.5 has no effect with --stamps_dir"),
        ("--stamps_dir x --renditions 2", "--renditions=2 has no effect with --stamps_dir"),
        ("--unheard_voice_share 1.5", "must be a finite number in [0, 1]"),
    ],
)
def test_flags_that_have_no_say_are_refused(script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script("prepare_speech").parse_args(arguments.split())
    assert message in capsys.readouterr().err
