"""Figures of a pipeline that speaks and listens, with a recogniser that is told what to hear."""

import io
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Audio, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_vqdit import VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training import evaluation_speech, tokenizer_metrics
from diffusers_vqdit.training.caption_recogniser import CaptionRecogniser, spoken_words
from diffusers_vqdit.training.evaluation_report import as_table
from diffusers_vqdit.training.evaluation_speech import SpeechMeasures, with_bursts, with_silence
from diffusers_vqdit.training.sound_levels import levels, middle_third
from diffusers_vqdit.utils.sounds import read_sound


WORDS = ["a red apple", "a blue box", "green", "a dot"]


class Told:
    """Hears the caption in what lasts long enough, and knows all captions but one."""

    def __init__(self, captions):
        self.captions = captions

    def knows(self, caption):
        return caption != "a dot"

    def hears(self, waveform, sampling_rate, caption):
        assert sampling_rate == 1600 and caption in self.captions
        return len(waveform) > 100

    def heard(self, waveform, sampling_rate):
        """One of two captions, by the length."""
        return self.captions[len(waveform) // 16 % 2] if len(waveform) > 100 else None


@pytest.fixture
def table(audio_codecs, tmp_path):
    rows = []
    for index in range(16):
        sound, picture = io.BytesIO(), io.BytesIO()
        audio_codecs.soundfile.write(sound, audio_codecs.tone(0.05 + 0.01 * (index % 8)), 1600, format="FLAC")
        Image.new("RGB", (16, 16), (16 * (index % 4), 200, 0)).save(picture, format="PNG")
        rows.append(
            {
                "audio": {"bytes": sound.getvalue(), "path": None},
                "image": {"bytes": picture.getvalue(), "path": None},
                "text": WORDS[index % 4],
                "label": ("round", "square")[index % 2],
                "language": "zh" if index == 9 else "en",
                "split": "train" if index == 0 else "test",
                "held_out": "" if index == 0 else ("pair", "voice")[index % 2],
            }
        )
    strings = {name: Value("string") for name in ("text", "label", "language", "split", "held_out")}
    rows = [{**row, "speech": row["audio"]} for row in rows]  # another column of sounds is left alone
    features = Features({"audio": Audio(1600), "speech": Audio(1600), "image": ImageFeature(), **strings})
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), tmp_path / "speech.parquet")
    return tmp_path / "speech.parquet"


def test_every_task_has_its_figure(run, talking_pipeline, audio_codecs, table, tmp_path, monkeypatch):
    talking_pipeline.save_pretrained(tmp_path / "pipe")
    monkeypatch.setattr(evaluation_speech, "CaptionRecogniser", Told)
    options = f"--dataset_name {table} --num_samples 4 --num_inference_steps 2 --output_dir {tmp_path}"
    earlier = [tmp_path / f"evaluation_speech-{number}.wav" for number in (2, 3, 11)]  # of a run that said more
    mine = [tmp_path / f"evaluation_speech{name}" for name in ("-03.wav", "-3-mine.wav", "-4.flac", "-x.wav", ".wav")]
    for file in (*earlier, *mine):
        file.write_bytes(b"old")
    run("evaluate_speech", f"--pretrained_model_name_or_path {tmp_path / 'pipe'} {options}")
    assert [file.exists() for file in earlier] == [True, False, False] and all(file.exists() for file in mine)
    report = json.loads((tmp_path / "evaluation_speech.json").read_text())
    tasks = talking_pipeline.transformer.config.tasks
    assert set(report) == {"codec", *tasks, "inpainting", "repair", "retrieval"}
    # Four of the even rows; of the odd ones those whose caption is known, without the Chinese one.
    for kind, count in (("pair", 4), ("voice", 3)):
        originals = report["codec"][f"{kind}, originals, recognised"]
        assert originals["count"] == count and originals == report["codec"][f"{kind}, round trips, recognised"]
        assert f"{kind}, recognised" in report["text->sound"] and f"{kind}, recognised" in report["image->sound"]
        assert f"{kind}, recognised" not in report["->sound"] and report["->sound"][f"{kind}, level"]["unit"] == "dB"
        spoken, different = (
            report["->sound"][f"{kind}, {name} recognised"] for name in ("any caption", "different captions")
        )
        hits = round(spoken["value"] * spoken["count"])
        assert spoken["count"] == count and min(hits, 1) <= different["value"] <= min(hits, 2)
        assert 0 <= report["codec"][f"{kind}, round trips, silent frames"]["value"] <= 1
        for task, figure in (("text", "exact match"), ("image", "nearest picture"), ("label", "right")):
            assert 0 <= report[f"sound->{task}"][f"{kind}, {figure}"]["value"] <= 1
        assert report["inpainting"][f"{kind}, middle third of what is heard silent, recognised"] == originals
        assert report["inpainting"][f"{kind}, filled in, recognised"] == originals
        assert report["repair"][f"{kind}, bursts of noise, recognised"] == originals
        assert report["repair"][f"{kind}, repaired, recognised"]["count"] == count
        found = report["retrieval"]
        for wanted, given in (("text", "sound"), ("sound", "text"), ("image", "sound"), ("sound", "image")):
            assert found[f"{kind}, {wanted} by {given}, the first is right"]["count"] == count
    # Of the odd rows all are square; of the even ones all are round.
    assert report["sound->label"]["pair, rows of the most frequent label"] == {"value": 1}
    assert "| codec | voice, originals, recognised |" in (tmp_path / "evaluation_speech.md").read_text()
    assert Image.open(tmp_path / "evaluation_speech.png").height > 112 * (len(tasks) + 6)
    made, rate = audio_codecs.soundfile.read(tmp_path / "evaluation_speech-2.wav")
    assert rate == 1600 and made.ndim == 1 and not (tmp_path / "evaluation_speech-3.wav").exists()


def test_sounds_are_made_in_voices_that_the_pipeline_knows(run, talking_pipeline, table, tmp_path, monkeypatch):
    """Labels of any segment are read from the column of its name; rows of other voices are left out of its tasks."""
    monkeypatch.setattr(evaluation_speech, "CaptionRecogniser", Told)
    segments = {**talking_pipeline.transformer.config.segments, "speaker": {"vocab_size": 2, "shape": [1]}}
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        segments=segments,
        tasks=["text+speaker->sound", "speaker->sound", "sound->speaker", "sound->text"],
    )
    parts = {**talking_pipeline.components, "transformer": transformer.eval()}
    of_sound = talking_pipeline.config.segments["sound"]
    speaker = {"modality": "label", "names": {"0": "high", "1": "low"}}
    pipe = VQDiTPipeline(**parts, segments={"sound": of_sound, "speaker": speaker}, id2label={0: "round", 1: "square"})
    pipe.save_pretrained(tmp_path / "pipe")
    options = f"--pretrained_model_name_or_path {tmp_path / 'pipe'} --dataset_name {table} --num_inference_steps 2"
    with pytest.raises(ValueError, match=r"column 'speaker' is not in the data: it has \['held_out', 'label'"):
        run("evaluate_speech", f"{options} --output_dir {tmp_path}")
    full = pq.read_table(table)
    voices = ["low", "high"] * 4 + ["hoarse"] * 8
    pq.write_table(full.append_column("speaker", pa.array(voices)), table)
    run("evaluate_speech", f"{options} --output_dir {tmp_path}")
    report = json.loads((tmp_path / "evaluation_speech.json").read_text())
    # Of rows 1 to 7, the even ones and those of the odd ones whose caption is known.
    for kind, count in (("pair", 3), ("voice", 2)):
        assert report["speaker+text->sound"][f"{kind}, recognised"]["count"] == count
        assert report["speaker->sound"][f"{kind}, level"]["count"] <= count  # of those that aren't empty
        # Nothing tells it a caption.
        assert report["speaker->sound"][f"{kind}, any caption recognised"]["count"] == count
        assert f"{kind}, recognised" not in report["speaker->sound"]
        assert report["sound->speaker"][f"{kind}, right"]["count"] == count
        assert report["sound->text"][f"{kind}, exact match"]["count"] > count
    assert not {"retrieval", "inpainting", "repair"} & set(report)  # it knows neither text->sound nor ->sound
    assert not (tmp_path / "evaluation_speech-3.wav").exists()


def test_what_is_said_may_be_a_segment_beside_what_is_heard(
    run, talking_pipeline, audio_codecs, table, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation_speech, "CaptionRecogniser", Told)
    segments = dict(talking_pipeline.transformer.config.segments)
    segments["answer"] = {**{key: segments["sound"][key] for key in ("vocab_size", "shape")}, "shared_with": "sound"}
    tasks = ["text->answer", "image->answer", "sound->text", "sound->answer", "->sound", "text->sound", "->answer"]
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, segments=segments, tasks=tasks
    )
    of_sound = talking_pipeline.config.segments["sound"]
    parts = {**talking_pipeline.components, "transformer": transformer.eval()}
    pipe = VQDiTPipeline(**parts, segments={"sound": of_sound, "answer": of_sound})
    pipe.save_pretrained(tmp_path / "pipe")
    options = f"--pretrained_model_name_or_path {tmp_path / 'pipe'} --dataset_name {table} --num_inference_steps 2"
    run("evaluate_speech", f"{options} --output_dir {tmp_path}")
    report = json.loads((tmp_path / "evaluation_speech.json").read_text())
    assert set(report) == {"codec", *tasks, "inpainting", "repair", "retrieval"}
    assert not [name for name in report["codec"] if "answer" in name]  # the data has no column of it
    # With recordings of it, some missing, the codec is measured on them, too: of the rows whose task is.
    full, short = pq.read_table(table), audio_codecs.tone(0.05)
    answers = [value if row % 4 else None for row, value in enumerate(full["audio"].to_pylist())]
    file = io.BytesIO()
    audio_codecs.soundfile.write(file, short, 1600, format="FLAC")
    answers[2] = {"bytes": file.getvalue(), "path": None}  # which isn't heard
    features = Features.from_arrow_schema(full.schema) | {"answer": Audio(1600)}
    rows = [{**row, "answer": answer} for row, answer in zip(full.to_pylist(), answers, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows, schema=Features(features).arrow_schema), table)
    run("evaluate_speech", f"{options} --output_dir {tmp_path}")
    again = json.loads((tmp_path / "evaluation_speech.json").read_text())
    codec = again.pop("codec")
    assert {name: figure for name, figure in codec.items() if "answer" not in name} == report.pop("codec")
    assert again == report
    # Of the rows 2, 4, ..., 14 four have an answer, of which one is too short.
    for name in ("originals", "round trips"):
        assert codec[f"pair, answer, {name}, recognised"]["value"] == 3 / 4
        assert codec[f"pair, answer, {name}, level"]["count"] == 4
    for task in ("text->answer", "image->answer", "sound->answer", "text->sound"):
        assert report[task]["pair, recognised"]["count"] == 7
    assert "pair, recognised" not in report["->answer"]
    assert not [name for name in report["retrieval"] if "answer" in name]  # the recordings are of what is heard


def test_a_language_without_a_recogniser_has_the_other_figures(run, talking_pipeline, table, tmp_path, monkeypatch):
    talking_pipeline.save_pretrained(tmp_path / "pipe")
    options = f"--pretrained_model_name_or_path {tmp_path / 'pipe'} --dataset_name {table} --num_inference_steps 2"
    run("evaluate_speech", f"{options} --language zh --output_dir {tmp_path}")
    report = json.loads((tmp_path / "evaluation_speech.json").read_text())
    assert report["sound->text"]["voice, exact match"]["count"] == 1 and "pair, level" not in report["->sound"]
    assert not any("recognised" in name for figures in report.values() for name in figures)
    # All other figures are those of English.
    monkeypatch.setattr(evaluation_speech, "CaptionRecogniser", Told)
    run("evaluate_speech", f"{options} --output_dir {tmp_path}")
    english = json.loads((tmp_path / "evaluation_speech.json").read_text())
    for task, figures in english.items():
        voice = {name for name in figures if name.startswith("voice, ") and "recognised" not in name}
        assert voice == set(report[task]), task
    with pytest.raises(ValueError, match=r"language='xx' is of no row; there are \['en', 'zh'\]"):
        run("evaluate_speech", f"{options} --language xx --output_dir {tmp_path}")


def test_rows_that_lack_something_are_left_out_or_named(run, talking_pipeline, table, tmp_path, monkeypatch):
    """Those without a picture or a language are left out; what none of them has is named before the work."""
    talking_pipeline.save_pretrained(tmp_path / "pipe")
    monkeypatch.setattr(evaluation_speech, "CaptionRecogniser", Told)
    full = pq.read_table(table)

    def measure(more="", drop=(), **changed):
        found = full.drop_columns(list(drop))
        for name, values in changed.items():
            place = found.column_names.index(name)
            found = found.set_column(place, found.field(name), pa.array(values, found.field(name).type))
        pq.write_table(found, tmp_path / "changed.parquet")
        options = f"--dataset_name {tmp_path / 'changed.parquet'} --num_inference_steps 1 --output_dir {tmp_path}"
        run("evaluate_speech", f"--pretrained_model_name_or_path {tmp_path / 'pipe'} {options} {more}")

    pictures = full["image"].to_pylist()
    measure(image=[*pictures[:3], *[None] * 12, pictures[0]], drop=["held_out"], language=["en"] * 15 + [None])
    report = json.loads((tmp_path / "evaluation_speech.json").read_text())
    assert report["codec"]["test, originals, recognised"]["count"] == 2
    for options, problem in (
        (
            {"drop": ["label"]},
            r"label_column='label' is not in the data: it has \['held_out', 'language', 'split', 't",
        ),
        ({"drop": ["audio"]}, "column 'audio' is not in the data"),
        ({"text": [*["green"] * 15, None]}, "column 'text': 1 rows have no caption, the first are rows .14"),
        (
            {"text": ["a dot"] * 16},
            "caption_column='text' has no caption known to the recogniser and a picture in 'en'",
        ),
        ({"image": [None] * 16, "more": "--language zh"}, "has no caption with a picture in 'zh'"),
        (
            {"language": [None, *["en"] * 14, None], "more": "--language x"},
            r"is of no row; there are \['None', 'en'\]",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            measure(**options)


def test_any_caption_is_one_of_training_too(table, script, monkeypatch):
    """In the language that is measured; the recogniser of what is given a caption has those that are measured."""
    monkeypatch.setattr(evaluation_speech, "CaptionRecogniser", Told)
    full = pq.read_table(table)
    texts, languages = full["text"].to_pylist(), full["language"].to_pylist()
    texts[:2], languages[1], languages[9] = ["a kite", "a rouge"], "fr", "en"
    for name, values in (("text", texts), ("language", languages), ("split", ["train"] * 2 + ["test"] * 14)):
        full = full.set_column(full.column_names.index(name), full.field(name), pa.array(values))
    for found, captions in ((full, {"a kite", *WORDS}), (full.slice(2), set(WORDS))):
        pq.write_table(found, table)
        options = f"--pretrained_model_name_or_path x --dataset_name {table}"
        data = evaluation_speech.SpeechData.load(script("evaluate_speech").parse_args(options.split()), 16)
        assert set(data.any_caption.captions) == captions and set(data.recogniser.captions) == set(WORDS[:3])


def test_samples_are_compared_with_the_pictures_of_training_too(table, script):
    """Those of the test split are numbered first; equal ones are there once, and what can't be read isn't."""
    full, other = pq.read_table(table), io.BytesIO()
    Image.new("RGB", (16, 16), "blue").save(other, format="PNG")
    pictures = full["image"].to_pylist()
    pictures[:2] = [{"bytes": content, "path": None} for content in (b"none", other.getvalue())]
    changed = {"image": pictures, "split": ["train"] * 4 + ["test"] * 12}
    for name, values in changed.items():
        full = full.set_column(
            full.column_names.index(name), full.field(name), pa.array(values, full.field(name).type)
        )
    for found, count in ((full, 5), (full.slice(4), 4)):
        pq.write_table(found, table)
        options = f"--pretrained_model_name_or_path x --dataset_name {table} --language zh"
        data = evaluation_speech.SpeechData.load(script("evaluate_speech").parse_args(options.split()), 16)
        assert data.picture_of == [0, 1, 2, 3] * 3 and data.pictures.shape == (count, 3, 16, 16)
        assert data.pictures[:4, 0, 0, 0].tolist() == [0, 16, 32, 48]
    assert (data.pictures[:, 2] == 0).all()


def test_what_is_found_has_the_caption_of_what_is_asked(monkeypatch):
    """Of a pipeline that finds what is at the query's own place; texts stand in the gallery once, sounds all."""

    class Finder:
        _segments = {name: SimpleNamespace(output_field=f"{name}s") for name in ("audio", "text")}

        def index(self, prompt=None, *, inputs=None, query, batch_size):
            return list(prompt or inputs["audio"])

        def retrieve(self, query, gallery, top_k, batch_size):
            return SimpleNamespace(indices=torch.tensor([[gallery.index(one)] for one in query]))

    captions = ["b", "a", "b"]
    asked = {"given": ["a", "a", "b"], "wanted": captions, "captions": captions, "batch_size": 2}
    assert evaluation_speech._recall(Finder(), Task.parse("audio->text"), **asked)["value"] == pytest.approx(2 / 3)
    asked |= {"given": [3, 2, 1], "wanted": [1, 2, 3]}
    assert evaluation_speech._recall(Finder(), Task.parse("text->audio"), **asked)["value"] == 1
    asked |= {"given": [2, 2, 2]}
    assert evaluation_speech._recall(Finder(), Task.parse("text->audio"), **asked)["value"] == pytest.approx(1 / 3)


def test_bursts_are_as_loud_as_the_sound_and_a_quarter_of_it_at_most():
    sound = np.linspace(-0.3, 0.5, 1600, dtype=np.float32)
    noisy = with_bursts(sound, 3)
    changed = (noisy != sound).mean()
    assert 1 / 16 < changed <= 1 / 4 and np.abs(noisy).max() <= 0.5 and noisy.dtype == np.float32
    assert np.array_equal(noisy, with_bursts(sound, 3)) and not np.array_equal(noisy, with_bursts(sound, 4))
    assert len(with_bursts(sound[:5], 0)) == 5


@pytest.mark.parametrize(("before", "after"), [(0, 0), (200, 0), (0, 500), (17, 31)])
@pytest.mark.parametrize("length", [3, 7, 300])
def test_the_middle_third_of_what_is_heard_is_silenced_and_nothing_else(length, before, after):
    """Whatever silence, or what is as good as silence, there is before it and after."""
    sound = np.concatenate([np.full(before, 0.004), np.full(length, 0.5), np.full(after, -0.004)]).astype(np.float32)
    silent = with_silence(sound) == 0
    assert sound.all() and with_silence(sound).dtype == np.float32
    assert silent.tolist() == middle_third(sound).tolist()
    heard = silent[before : before + length]
    assert silent.sum() == heard.sum() and heard[length // 3] and not heard[0] and not heard[-1]
    assert abs(heard.mean() - 1 / 3) < 2 / length


def test_of_silence_the_middle_third_is_that_of_all():
    assert middle_third(np.zeros(9)).tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_spectrograms_show_low_tones_below():
    tones = [np.sin(2 * np.pi * hertz * np.arange(n) / 8000) for hertz, n in ((100, 4000), (3000, 8000))]
    low, high = evaluation_speech.spectrograms(tones, 8000)
    assert low.shape == high.shape and low.shape[0] == 3 and 0 <= low.min() and low.max() <= 1
    bands = low.shape[1]
    assert low[0, :, 4].argmax() > 0.9 * bands and high[0, :, 4].argmax() < 0.3 * bands
    assert low[0, :, -4].max() < 0.2 < high[0, :, -4].max()  # what is after the shorter sound is silence


def test_a_pipeline_without_sounds_is_refused(run, pipeline, table, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "pipe")
    monkeypatch.setattr(evaluation_speech, "CaptionRecogniser", Told)
    with pytest.raises(ValueError, match="the pipeline has no sounds"):
        run("evaluate_speech", f"--pretrained_model_name_or_path {tmp_path / 'pipe'} --dataset_name {table}")


def test_levels_are_those_of_the_samples():
    found = levels([np.full(100, 0.1), np.ones(100), torch.zeros(0)], 1000)
    assert found["level"]["value"] == pytest.approx(-10) and found["clipped samples"]["value"] == 0.5
    assert found["empty"]["value"] == pytest.approx(1 / 3) and found["silent frames"]["value"] == 0
    assert levels([np.zeros(0), torch.zeros(0)], 1000) == {"empty": {"value": 1}}


@pytest.mark.parametrize("rate", [40, 1000, 11025])
@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_frames_are_silent_below_50_db(rate, share):
    """Fifty of a second, at whatever rate."""
    time = np.arange(2 * rate)
    sound = np.where(time < share * 2 * rate, 0.003, 0.004) * (-1.0) ** time  # -50.5 and -48 dB
    assert levels([sound], rate)["silent frames"]["value"] == pytest.approx(share, abs=0.02)


def test_a_number_of_things_has_no_decimals_in_the_table():
    table = as_table({"->audio": {"pair, different captions recognised": {"value": 12, "unit": ""}}})
    assert table.endswith("| ->audio | pair, different captions recognised | 12 |")


def test_a_recogniser_is_no_dictionary_of_signs():
    assert spoken_words("Waving hand: medium-dark skin tone!") == "waving hand medium dark skin tone"
    pytest.importorskip("pocketsphinx")
    recogniser = CaptionRecogniser(["red apple", "ZZZ", "苹果"])
    assert recogniser.knows("red apple") and not recogniser.knows("ZZZ") and not recogniser.knows("苹果")
    for sound in (np.zeros(0), np.zeros(8000), np.random.default_rng(0).uniform(-0.3, 0.3, 8000)):
        assert not recogniser.hears(sound, 16000, "red apple") and recogniser.heard(sound, 16000) is None
    with pytest.raises(ValueError, match="none of the captions"):
        CaptionRecogniser(["苹果"])


@pytest.mark.parametrize("caption", ["red apple", "green apple", "red heart"])
def test_a_recogniser_hears_which_of_some_captions_is_said(root, caption):
    """By espeak-ng's voice en-us, at 160 words a minute."""
    pytest.importorskip("pocketsphinx")
    recogniser = CaptionRecogniser(["red heart", "green apple", "red apple"])
    sound = read_sound(root / "tests/fixtures/red_apple.ogg", 11025)
    assert recogniser.hears(sound, 11025, caption) == (caption == "red apple")
    assert recogniser.heard(sound, 11025) == "red apple"


def test_unconditional_sounds_are_counted_by_what_is_heard(monkeypatch):
    heard = iter(["a", None, "b", "a"])
    data = SimpleNamespace(recogniser=Told([]), any_caption=SimpleNamespace(heard=lambda sound, rate: next(heard)))
    found = evaluation_speech.recognised(data, [np.zeros(1)] * 4, 1600, None)
    assert found["any caption recognised"]["value"] == 3 / 4 and found["different captions recognised"]["value"] == 2


@pytest.mark.parametrize("kind", ["encodec", "spectrogram"])
def test_a_codec_alone_is_measured(run, audio_codecs, table, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tokenizer_metrics, "CaptionRecogniser", Told)
    codec, extractor = audio_codecs.audio_codec(kind)
    codec.save_pretrained(tmp_path / kind)
    extractor.save_pretrained(tmp_path / kind)
    options = f"--tokenizer {tmp_path / kind} --dataset_name {table} --output_file {tmp_path / 'figures.json'}"
    run("evaluate_tokenizer", f"{options} --language en --recognise --max_samples 10")
    figures = json.loads((tmp_path / "figures.json").read_text())
    # Of the test split's first ten English rows, seven last long enough; two of each eight say what is not known.
    rows = [row for row in range(1, 16) if row != 9][:10]
    known = [row for row in rows if WORDS[row % 4] != "a dot"]
    heard = sum(80 + 16 * (row % 8) > 100 for row in known) / len(known)
    assert figures["count"] == 10 and figures["recognised_originals"] == pytest.approx(heard)
    # As long as the originals are those that come back, whatever their codes.
    for name in ("quarter_random", "half_random", *["griffin_lim"] * (kind == "spectrogram")):
        assert figures[f"recognised_{name}"] == figures["recognised"]
    assert ("recognised_griffin_lim" in figures) == (kind == "spectrogram")
    assert 0 <= figures["recognised"] <= 1 and 0 < figures["usage"] <= 1 <= figures["perplexity"] <= 16
    assert ("psnr" in figures) == ("usage_3" not in figures) == (kind == "spectrogram")
    assert figures["spectral_distance"] > 0
    sounds = [audio_codecs.tone(0.05 + 0.01 * (row % 8)) for row in rows]
    alive: list[weakref.ref] = []

    def one_after_the_other():
        for sound in sounds:
            kept = sound.copy()
            alive.append(weakref.ref(kept))
            yield kept
            del kept
            assert sum(one() is not None for one in alive) <= 1  # that of the loop

    again = tokenizer_metrics.measure_audio_tokenizer(codec, extractor, one_after_the_other())
    assert not [name for name in again if "recognised" in name]
    # The files have 16 bits.
    assert again["spectral_distance"] == pytest.approx(figures["spectral_distance"], rel=0.1)
    with pytest.raises(ValueError, match="language='xx' is of no row; there are "):
        run("evaluate_tokenizer", f"{options} --language xx")
    run("evaluate_tokenizer", options)
    assert json.loads((tmp_path / "figures.json").read_text())["count"] == 15


def test_what_is_right_is_what_is_said_of_the_own_row():
    measures = SpeechMeasures.__new__(SpeechMeasures)
    measures.fields = {"text": "texts", "label": "labels", "image": "images"}
    measures.labels = {"label": ["round", "square"]}
    pictures = torch.eye(4).view(4, 1, 2, 2)
    measures.data = SimpleNamespace(pictures=pictures, picture_of=[3, 0, 1, 2])
    measures.__dict__["real"] = (2 * pictures - 1).flatten(1)
    some = SimpleNamespace(rows=[0, 2, 3], captions=["a", "b", "c"], of=lambda name: ["round", "square", "square"])
    right = measures._figures("text", ["a", "c", "c"], some)["exact match"]
    assert (right["value"], right["count"]) == (2 / 3, 3)
    labels = measures._figures("label", ["square", "square", "square"], some)
    assert labels["right"]["value"] == labels["rows of the most frequent label"]["value"] == 2 / 3
    drawn = pictures[[3, 2, 2]]  # the second is another's
    assert measures._figures("image", drawn, some)["nearest picture"]["value"] == 2 / 3
    measures.data.pictures = None
    assert measures._figures("image", drawn, some) == {}
