"""Segments of sounds in a pipeline, with codecs of every kind."""

import numpy as np
import pytest
import torch
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from diffusers_vqdit import MaskedDiffusionScheduler, MultiTokenizerModel, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.audio_codecs import check_codec


KINDS = ["dac", "encodec", "mimi", "spectrogram"]
FRAMES, CODES, RATE = 12, 16, 1600
LENGTH = 16 * FRAMES  # samples of the longest sound


@pytest.fixture(scope="module", params=KINDS)
def pipe(request, audio_codecs):
    codec, extractor = audio_codecs.audio_codec(request.param)
    torch.manual_seed(3)
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        segments={
            "sound": {"vocab_size": CODES + 1, "shape": [FRAMES, 3], "patch": [1, 3], "separate_codebooks": True},
            "label": {"vocab_size": 3, "shape": [1]},
        },
        tasks=["label->sound", "sound->label", "->sound"],
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    pipe = VQDiTPipeline(
        transformer.eval(),
        MaskedDiffusionScheduler(),
        id2label={0: "dog", 1: "cat", 2: "cow"},
        segments={"sound": {"modality": "audio", "tokenizer": "codec"}},
        segment_tokenizers=MultiTokenizerModel({"codec": codec}, {"codec": extractor}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_sounds_come_out_with_their_rate(pipe):
    drawn = pipe(class_labels=["dog", "cat"], generator=seeds(1, 2))
    assert drawn.sampling_rate == RATE and len(drawn.audios) == 2 and drawn.segments["sound"] is drawn.audios
    assert all(one.dtype == np.float32 and one.ndim == 1 and len(one) % 16 == 0 for one in drawn.audios)
    assert all(np.abs(one).max() <= 1 for one in drawn.audios)
    assert pipe(inputs={"sound": drawn.audios}).labels  # what is spoken can be heard
    tensors = pipe(class_labels=["dog", "cat"], generator=seeds(1, 2), output_type="pt").audios
    assert all(isinstance(one, torch.Tensor) for one in tensors)
    assert all(np.array_equal(one.numpy(), other) for one, other in zip(tensors, drawn.audios, strict=True))
    arrays = pipe(class_labels=["dog", "cat"], generator=seeds(1, 2), output_type="np")
    assert arrays.sampling_rate == RATE and arrays.segments["sound"] is arrays.audios
    assert all(isinstance(one, np.ndarray) and one.dtype == np.float32 for one in arrays.audios)
    assert all(np.array_equal(one, other) for one, other in zip(arrays.audios, drawn.audios, strict=True))
    codes = pipe(class_labels=["dog", "cat"], generator=seeds(1, 2), output_type="latent")
    assert codes.audios.shape == (2, FRAMES, 3) and codes.sampling_rate is None and codes.images is None
    *others, segments, audios, rate = pipe(class_labels=["dog", "cat"], generator=seeds(1, 2), return_dict=False)
    assert others == [None] * 3 and segments == {"sound": audios} and rate == RATE
    assert all(np.array_equal(one, other) for one, other in zip(audios, drawn.audios, strict=True))
    *others, labels = pipe(inputs={"sound": drawn.audios}, return_dict=False)
    assert others == [None] * 2 and len(labels) == 2
    assert [row.task for row in pipe.tasks] == ["label->sound", "sound->label", "->sound"]
    assert pipe.hub_task == "audio-classification"


@pytest.mark.parametrize("pipe", ["spectrogram"], indirect=True)
def test_codes_of_a_pipeline_go_to_a_vocoder(pipe):
    """As docs/audio.md says: without frames of the end, which no codec knows."""
    torch.manual_seed(0)
    sizes = {"upsample_initial_channel": 8, "upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4]}
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(model_in_dim=6, **sizes)).eval()
    codes = pipe(class_labels="dog", output_type="latent", generator=seeds(1)).audios[0]
    codec = pipe.segment_tokenizers.tokenizers["codec"]
    codes = codes[(codes < codec.num_codes).all(1)]
    with torch.no_grad():
        sound = codec.decode_codes(codes[None], vocoder).sample[0]
    assert 0 < len(codes) <= FRAMES and sound.shape == (16 * len(codes),)
    assert sound.isfinite().all() and sound.std() > 0


def test_a_sound_doesnt_depend_on_its_batch(pipe):
    together = pipe(class_labels=["dog", "cat", "cow"], generator=seeds(1, 2, 3)).audios
    for index, name in enumerate(("dog", "cat", "cow")):
        alone = pipe(class_labels=name, generator=seeds(index + 1)).audios[0]
        assert np.array_equal(alone, together[index])
    segment = pipe._segments["sound"]
    sounds = [0.5 * np.sin(np.arange(n) / 3).astype(np.float32) for n in (16, 50, LENGTH)]
    codes = segment.encode(sounds)
    for one, row in zip(sounds, codes, strict=True):
        assert segment.encode([one])[0].equal(row)


def test_the_end_follows_the_last_frame_and_ends_what_is_decoded(pipe):
    segment = pipe._segments["sound"]
    sound = 0.5 * np.sin(np.arange(40) / 3).astype(np.float32)
    codes = segment.encode(sound)
    assert codes.shape == (1, FRAMES, 3) and segment.end == CODES
    assert (codes[0, :3] < CODES).all() and (codes[0, 3:] == CODES).all()
    (decoded,) = segment.decode(codes)
    assert len(decoded) == 48
    # A stray end is none, and stands for the code before; most of a frame's are one.
    stray = codes.clone()
    stray[0, 1, 0] = CODES
    expected = codes.clone()
    expected[0, 1, 0] = codes[0, 0, 0]
    assert np.array_equal(segment.decode(stray)[0], segment.decode(expected)[0])
    stray[0, 1, 1] = CODES
    assert len(segment.decode(stray)[0]) == 16
    assert len(segment.decode(torch.full((1, FRAMES, 3), CODES))[0]) == 0
    assert len(segment.decode(torch.zeros(1, FRAMES, 3, dtype=torch.int64))[0]) == LENGTH


def test_a_sound_that_is_too_long_is_cut_with_a_warning(pipe, caplog):
    sound = 0.5 * np.sin(np.arange(LENGTH + 1) / 3).astype(np.float32)
    with caplog.at_level("WARNING"):
        codes = pipe._segments["sound"].encode(sound)
    assert codes.shape == (1, FRAMES, 3) and codes.max() < CODES
    assert f"{FRAMES + 1} frames; {FRAMES} are used" in caplog.text


@pytest.mark.parametrize("start", [0, 5, 9])
def test_what_is_known_of_a_sound_stays(pipe, start):
    """Codes and samples, to the bit; and a mask says where, whatever its resolution."""
    sound = 0.5 * np.sin(np.arange(LENGTH) / 3).astype(np.float32)
    mask = np.zeros(FRAMES)
    mask[start : start + 3] = 1
    known = np.repeat(mask, 16) == 0
    for masks in (mask, np.repeat(mask, 16), torch.from_numpy(mask).bool(), [mask, mask]):
        options = {"mask_image": masks, "generator": seeds(1, 2)}
        drawn = pipe(inputs={"sound": [sound, sound]}, output="sound", **options).audios
        assert all(np.array_equal(one[known], sound[known]) and len(one) == LENGTH for one in drawn)
        assert (drawn[0] != sound)[~known].any() and np.isfinite(drawn[0]).all()
        codes = pipe(inputs={"sound": [sound, sound]}, output="sound", output_type="latent", **options).audios
        whole = pipe._segments["sound"].encode([sound, sound])
        assert codes[:, mask == 0].equal(whole[:, mask == 0]) and not codes.equal(whole)


def test_what_was_blanked_is_not_heard_and_edges_dont_click(pipe):
    """Whatever stood under the mask, beyond the frames that it told its neighbours of."""
    segment, mask = pipe._segments["sound"], torch.zeros(LENGTH, dtype=torch.bool)
    mask[48:96] = True
    known = (0.5 * np.sin(np.arange(LENGTH) / 8)).astype(np.float32)
    filled = torch.full((LENGTH,), 0.25)
    joined = segment.paste(filled, known, mask)
    spoiled = np.where(mask.numpy(), 0.9, known).astype(np.float32)
    assert joined.equal(segment.paste(filled, spoiled, mask))
    assert joined[~mask].equal(torch.from_numpy(known)[~mask])
    assert joined[66:78].allclose(filled[66:78])  # far from the edges what was generated
    assert joined.diff().abs().max() < 0.15
    assert segment.paste(filled, known, torch.ones_like(mask)).equal(filled)


def test_what_is_filled_in_is_no_shorter_than_the_sound(pipe):
    """Of sounds of several lengths and rates, each as long as it was."""
    sounds = [
        {"array": 0.5 * np.sin(np.arange(50) / 3), "sampling_rate": RATE},
        {"array": 0.5 * np.sin(np.arange(60) / 3), "sampling_rate": RATE // 2},
    ]
    mask = np.array([0, 1, 1, 0])
    drawn = pipe(inputs={"sound": sounds}, output="sound", mask_image=mask, num_images_per_prompt=2).audios
    assert [len(one) for one in drawn] == [50, 50, 120, 120]
    assert not np.array_equal(drawn[0], drawn[1])
    assert pipe(inputs={"sound": sounds}, output="sound", strength=0.25).audios[0].ndim == 1


def test_listening_and_likelihoods(pipe):
    sound = 0.5 * np.sin(np.arange(LENGTH) / 3).astype(np.float32)
    assert pipe(inputs={"sound": sound}).labels[0] in ("dog", "cat", "cow")
    codes = pipe._segments["sound"].encode(sound)
    same = pipe(inputs={"sound": codes}, generator=seeds(1)).labels
    assert same == pipe(inputs={"sound": sound}, generator=seeds(1)).labels
    assert pipe.classify(inputs={"sound": sound}).names == ["dog", "cat", "cow"]
    nll = pipe.score("label->sound", class_labels="dog", inputs={"sound": sound}, num_samples=2).nll
    assert nll.shape == (1,) and nll.isfinite().all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, 3)), "must be an array .T,."),
        ([np.ones(3)], "has 1 masks for 2 sounds"),
        (np.array([0.0, 2.0]), "must be an array .T,."),
        ("middle", "must be an array .T,."),
        (np.array([]), "must be an array .T,."),
    ],
)
def test_what_is_no_mask_is_refused(pipe, mask, message):
    with pytest.raises(ValueError, match=message):
        pipe(inputs={"sound": [np.zeros(50, np.float32)] * 2}, output="sound", mask_image=mask)


def test_a_mask_beyond_the_longest_sound_is_refused(pipe):
    hop = LENGTH // FRAMES
    sound = np.random.default_rng(0).standard_normal(hop * (FRAMES + 4)).astype(np.float32) / 10
    mask = np.zeros(len(sound))
    mask[hop * (FRAMES + 1) :] = 1
    message = f"at {hop * (FRAMES + 1) / RATE:.2f} s, but sounds of 'sound' end at {hop * FRAMES / RATE:.2f} s"
    with pytest.raises(ValueError, match=message):
        pipe(inputs={"sound": sound}, output="sound", mask_image=mask)


def test_a_batch_of_sounds_is_a_gallery_of_as_many(pipe):
    sounds = np.random.default_rng(0).standard_normal((3, 1, 40)).astype(np.float32)
    gallery = pipe.index(inputs={"sound": sounds}, query="label")
    assert len(gallery) == 3 and len(pipe.retrieve("cat", gallery, top_k=3).indices[0]) == 3


def test_what_is_no_sound_is_refused_by_name(pipe):
    for value in (np.zeros((2, 3, 4, 5)), "gone.wav", np.array([np.nan]), 7):
        with pytest.raises(ValueError, match=r"inputs\['sound'\]: "):
            pipe(inputs={"sound": value})
    with pytest.raises(ValueError, match=r"asks for 'sound', which you passed: give mask_image"):
        pipe(inputs={"sound": np.zeros(50, np.float32)}, output="sound")


def test_segments_that_are_no_sounds_codes_are_refused(audio_codecs, pipe):
    components = {"scheduler": MaskedDiffusionScheduler(), "segment_tokenizers": pipe.segment_tokenizers}
    for shape, more in (([FRAMES], {}), ([FRAMES, 3], {})):
        transformer = VQDiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            segments={"sound": {"vocab_size": CODES + 1, "shape": shape, **more}},
            tasks=["->sound"],
        )
        with pytest.raises(ValueError, match="sound"):
            VQDiTPipeline(transformer, **components, segments={"sound": {"modality": "audio", "tokenizer": "codec"}})
    codec, extractor = audio_codecs.audio_codec("encodec")
    codec.config.normalize = True
    with pytest.raises(ValueError, match="normalize=True of EncodecModel's config must be False"):
        check_codec(codec)
