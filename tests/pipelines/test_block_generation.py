"""Texts by blocks: what is known stays, a row is its own, and likelihoods are those of the blocks."""

import itertools
import re

import pytest
import torch
from diffusers.utils import logging

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.likelihood.block_bounds import negative_elbo_of_blocks
from diffusers_vqdit.models import layers
from diffusers_vqdit.pipelines import denoising_mixin
from diffusers_vqdit.pipelines.guidance import predict_event
from diffusers_vqdit.training.byte_pairs import train_text_tokenizer


TEXTS = ["once upon a time\nthere was a king", "a king had a daughter", "the end of a time"]
TASKS = ["title->poem", "poem->title", "->poem", "->title", "poem->kind"]


@pytest.fixture(scope="module")
def words():
    return train_text_tokenizer(TEXTS * 3, 300)


def make(tokenizer, size: int | None = None, **options) -> VQDiTPipeline:
    torch.manual_seed(0)
    size = size or len(tokenizer)
    segments = {
        "title": {"vocab_size": size, "shape": [8], "block_length": 4},
        "poem": {"vocab_size": size, "shape": [12], "block_length": 4, "shared_with": "title"},
        "kind": {"vocab_size": 3, "shape": [1]},
    }
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, segments=segments, tasks=TASKS
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    entries = {name: {"modality": "text", "tokenizer": "tokenizer"} for name in ("title", "poem")}
    entries["kind"] = {"modality": "label", "names": ["a", "b", "c"]}
    pipe = VQDiTPipeline(
        transformer.eval(), MaskedDiffusionScheduler(**options), tokenizer=tokenizer, segments=entries
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(words):
    return make(words)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


SAMPLERS = [
    {"sampler": "ancestral", "masking": "linear"},
    {"sampler": "ancestral", "remask": 0.1},
    *({"sampler": name} for name in ("confidence", "halton", "entropy_bound", "threshold")),
]


@pytest.mark.parametrize("options", SAMPLERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_row_does_not_depend_on_its_batch(words, options, guidance_scale):
    pipe = make(words, **options)
    titles = ["a king", "the end of a time and a king"]  # of one and of several blocks
    poems = ["once upon a time there was", "a"]
    options = {"output": "poem", "output_type": "latent", "guidance_scale": guidance_scale, "gen_length": 9}
    both = pipe(inputs={"title": titles, "poem": poems}, generator=seeds(1, 2), **options).segments["poem"]
    for row, (title, poem) in enumerate(zip(titles, poems, strict=True)):
        alone = pipe(inputs={"title": title, "poem": poem}, generator=seeds(row + 1), **options).segments["poem"]
        assert torch.equal(both[row, : alone.shape[1]], alone[0]) and (both[row, alone.shape[1] :] == 2).all()


def test_known_codes_stay_and_the_length_is_the_one_asked_for(pipe, words):
    prompts = ["once upon a time", "a king had a daughter and a king"]
    for options in ({}, {"block_length": 3}, {"threshold": 0.0}, {"top_k": 3, "top_p": 0.5}, {"temperature": 0.0}):
        output = pipe(inputs={"poem": prompts}, output="poem", gen_length=6, eos_early_stop=False, **options)
        codes = pipe(
            inputs={"poem": prompts},
            output="poem",
            gen_length=6,
            eos_early_stop=False,
            output_type="latent",
            **options,
        ).segments["poem"]
        for prompt, text, row in zip(prompts, output.texts, codes, strict=True):
            ids = words(prompt).input_ids
            assert row[: len(ids)].tolist() == ids and text.startswith(prompt)
            assert (row[len(ids) + 6 :] == words.eos_token_id).all()
    assert (
        output.texts
        == pipe(inputs={"poem": prompts}, output="poem", max_new_tokens=6, eos_early_stop=False, temperature=0.0).texts
    )


@pytest.mark.parametrize("output", ["poem", "title"])
def test_longer_texts_than_those_trained_on_are_one_warning(pipe, caplog, output):
    """Where they are given, and where they are begun with."""
    logging.enable_propagation()
    longer = ["a king " * 12, "an end " * 13]
    filled = ["a king", *longer, "a <mask>" if output == "title" else "a"]
    options = {"output": output, "output_type": "latent", "num_inference_steps": 1}
    whole = pipe(inputs={"title": filled}, generator=seeds(*range(4)), **options).segments[output]
    outcome = "are longer than those that the model was trained on"
    problem = f"texts of inputs['title'] have more than 7 tokens and {outcome}"
    total = 3 if output == "title" else 4
    assert caplog.messages == [f"2 of {total} {problem}; the first is {longer[0][:59]!r}...".replace("'...", "...")]
    logging.disable_propagation()
    for row, text in enumerate(filled):
        alone = pipe(inputs={"title": text}, generator=seeds(row), **options).segments[output]
        assert torch.equal(whole[row, : alone.shape[1]], alone[0])


def test_a_threshold_says_the_number_of_steps(pipe):
    """Whatever the scheduler's own sampler is; from one call a block to one a token."""
    with pytest.raises(ValueError, match="'auto' needs one of the samplers .*; pass threshold=0.5 with it, or pass a"):
        pipe(output="poem", num_inference_steps="auto")
    with pytest.raises(ValueError, match="'auto' needs one of the samplers .*'confidence'; pass a number"):
        pipe(inputs={"poem": "a"}, output="kind", num_inference_steps="auto")
    options = {"output": "poem", "num_inference_steps": "auto", "gen_length": 8, "eos_early_stop": False}
    for threshold, calls in ((0.0, 2), (1.0, 8)):
        times = []
        pipe(**options, threshold=threshold, callback_on_step_end=lambda *args, times=times: times.append(1) or {})
        assert len(times) == calls


def test_guidance_sees_the_earlier_blocks(pipe):
    options = {"inputs": {"title": "a king"}, "output": "poem", "output_type": "latent", "gen_length": 12}
    prefixes = []
    forward = pipe.transformer.forward

    def record(codes, *args, prefix=None, **kwargs):
        prefixes.append(prefix)
        return forward(codes, *args, prefix=prefix, **kwargs)

    pipe.transformer.forward = record
    pipe(**options, guidance_scale=2.0, generator=seeds(3), num_inference_steps=1, eos_early_stop=False)
    first, *rest = prefixes
    assert first.names == ("title",) and not first.offsets
    assert [(one.names, one.offsets) for one in rest] == [
        (names, {"poem": size}) for size in (4, 8) for names in (("title",), ())
    ]


@pytest.mark.parametrize("inputs", [None, {"poem": "one"}, {"poem": "one <mask>"}])
def test_another_tokenizer_than_the_codes_is_refused(words, inputs):
    with pytest.raises(ValueError, match="but the transformer 3 codes: .* is not the one that made the codes"):
        make(words, size=3)(inputs=inputs, output="poem", num_inference_steps=1)


def test_few_codes_are_left_by_top_k_and_top_p(pipe):
    options = {"output": "poem", "output_type": "latent", "gen_length": 8, "eos_early_stop": False}
    likeliest = pipe(**options, temperature=0.0, num_inference_steps=1).segments["poem"]
    for few in ({"top_k": 1}, {"top_p": 1e-6}):
        found = pipe(**options, **few, num_inference_steps=1, generator=seeds(5)).segments["poem"]
        assert torch.equal(found, likeliest)


def test_a_text_that_has_ended_takes_no_more_calls(pipe, words):
    end, rows = words.eos_token_id, []
    head = pipe.transformer.heads["title"]
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.where(torch.arange(len(words)) == end, 50.0, 0.0)
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda codes, *args, **kwargs: (
        rows.append(len(codes["poem"])) or forward(codes, *args, **kwargs)
    )
    output = pipe(inputs={"poem": ["a king had a daughter", "a"]}, output="poem", num_inference_steps=1, gen_length=40)
    assert output.texts == ["a king had a daughter", "a"] and rows == [1, 1]
    rows.clear()
    pipe(output="poem", num_inference_steps=1, gen_length=40, eos_early_stop=False)
    assert len(rows) == 10


def test_blanks_are_filled_and_the_rest_stays(pipe, words):
    text = "once <mask> a time there <mask> a king"
    (found,) = pipe(inputs={"poem": text}, output="poem", output_type="latent").segments["poem"].tolist()
    parts = [words(piece).input_ids for piece in ("once", " a time there", " a king")]
    expected = [*parts[0], None, *parts[1], None, *parts[2], words.eos_token_id]
    assert len(found) >= len(expected)
    assert all(
        code in (wanted, code if wanted is None else wanted) for code, wanted in zip(found, expected, strict=False)
    )
    assert all(code == words.eos_token_id for code in found[len(expected) :])
    filled = pipe(inputs={"poem": text}, output="poem").texts[0]
    assert filled.startswith("once") and filled.endswith(" a king") and "<mask>" not in filled
    assert " a time there" in filled


def test_labels_of_long_texts_and_texts_of_any_length_are_made(pipe):
    texts = ["a king", "once upon a time there was a king"]
    found = pipe.classify(inputs={"poem": texts}, output="kind").probabilities
    assert len(found) == 2 and (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert len(pipe(inputs={"poem": TEXTS}, output="title").texts) == 3


def test_a_callback_sees_the_block_and_an_interrupt_ends_the_text(pipe, words):
    shapes = []

    def look(pipe, step, time, tensors):
        shapes.append(tuple(tensors["latents"].shape))
        if len(shapes) == 5:
            pipe._interrupt = True
        return {}

    text = pipe(output="poem", num_inference_steps=4, callback_on_step_end=look, eos_early_stop=False).texts[0]
    assert shapes == [(1, 4)] * 5 and isinstance(text, str)


def test_guidance_that_a_callback_switches_off_stays_off_in_all_blocks(pipe, monkeypatch):
    scales = []

    def spy(transformer, codes, event, prefix, prefixes, given, **options):
        scales.append([float(scale[0]) for scale in given])
        return predict_event(transformer, codes, event, prefix, prefixes, given, **options)

    def cut(pipe, step, time, tensors):
        pipe._guidance_scale = 1.0
        return {}

    monkeypatch.setattr(denoising_mixin, "predict_event", spy)
    options = {"num_inference_steps": 2, "eos_early_stop": False, "gen_length": 12}
    pipe(inputs={"title": "king"}, output="poem", guidance_scale=3.0, callback_on_step_end=cut, **options)
    assert scales == [[3.0], *[[]] * 5]


def test_tables_of_positions_of_long_texts_are_few(pipe):
    layers._kept_positions.cache_clear()
    pipe(output="poem", gen_length=160, num_inference_steps=1, eos_early_stop=False)
    assert layers._kept_positions.cache_info().currsize in range(1, 7)  # lengths are powers of two


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gen_length": 0}, "gen_length=0"),
        ({"gen_length": 3, "max_new_tokens": 3}, "give gen_length or max_new_tokens"),
        ({"max_new_tokens": "3"}, "max_new_tokens='3'"),
        ({"block_length": 1.5}, "block_length=1.5"),
        ({"threshold": 2}, "threshold=2"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0}, "top_p=0"),
        ({"eos_early_stop": "yes"}, "eos_early_stop"),
        ({"output": "kind", "inputs": {"poem": "a king"}, "top_k": 3}, "top_k=3 is for texts generated by blocks"),
        (
            {"output": "kind", "inputs": {"poem": "a king"}, "eos_early_stop": False},
            "eos_early_stop=False is for texts generated by blocks",
        ),
        *(
            ({"output": "kind", "inputs": {"poem": "a"}, name: 3}, f"^{name}=3 is for texts generated by blocks")
            for name in ("gen_length", "max_new_tokens", "block_length")
        ),
        ({"inputs": {"poem": " "}}, "non-empty string"),
        *(
            ({"latents": wrong}, r"latents of 'poem' must be int64 codes of shape \(1, n\), n any length from 1 on")
            for empty in (torch.zeros(1, 0).long(), torch.zeros(1, 4), torch.zeros(1, 3, 3).long())
            for wrong in (empty, {"poem": empty})
        ),
        *(
            ({"inputs": {name: wrong}}, rf"inputs\['{name}'\] must be int64 codes of shape \('B', n\), n any length")
            for name in ("title", "poem")
            for wrong in (torch.zeros(1, 0).long(), torch.zeros(1, 3, 3).long(), [torch.zeros(2, 2).long()])
        ),
    ],
)
def test_wrong_options_are_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"output": "poem", **options})


def test_latents_of_any_length_are_begun_from(pipe):
    latents = torch.full((1, 20), len(pipe.tokenizer))
    latents[0, 3:7] = 11
    found = pipe(output="poem", latents=latents, output_type="latent", eos_early_stop=False).segments["poem"]
    assert found.shape == (1, 20) and (found[0, 3:7] == 11).all() and (found < len(pipe.tokenizer)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods


@torch.no_grad()
def test_the_bound_is_the_sum_of_the_blocks_bounds(pipe):
    """Against each block on its own, with the very masks."""
    transformer, poem = pipe.transformer, pipe._segment("poem")
    codes = poem.encode(["a king", "once upon a time there was a king"])
    lengths, length = poem.lengths(codes), 4
    subsets = [mask for size in range(1, 5) for mask in itertools.combinations(range(4), size)]
    # All masks, each as often as its probability 1 / (4 C(4, k)) says: the estimate is then exact.
    often = {1: 3, 2: 2, 3: 3, 4: 12}
    listed = [mask for mask in subsets for _ in range(often[len(mask)])]
    masks = torch.zeros(len(listed), codes.shape[1] // length, length, dtype=torch.bool)
    for index, mask in enumerate(listed):
        masks[index, :, list(mask)] = True
    found = negative_elbo_of_blocks(transformer, {"poem": codes}, None, masks, lengths=lengths)
    assert found.num_codes.tolist() == lengths.tolist() and lengths[0] < lengths[1]
    for row in range(2):
        total, prefix = 0.0, None
        for block in range(int(lengths[row]) // length):
            part = codes[row : row + 1, block * length : (block + 1) * length]
            for mask in listed:
                hidden = torch.zeros(1, 4, dtype=torch.bool)
                hidden[0, list(mask)] = True
                logits = transformer({"poem": part.masked_fill(hidden, poem.vocab_size)}, prefix=prefix).sample["poem"]
                scores = logits.log_softmax(-1).gather(-1, part[..., None])[..., 0]
                total -= float(scores[hidden].sum()) * length / len(mask) / len(listed)
            prefix = transformer.extend_prefix(prefix, {"poem": part})
        assert float(found.nll[row]) == pytest.approx(total, rel=1e-5)


def test_scores_and_candidates_of_texts_of_any_length(pipe):
    poems = ["a king", "once upon a time there was a king"]
    options = {"num_samples": 4}
    both = pipe.score("title->poem", inputs={"title": "the end", "poem": poems}, generator=seeds(0)[0], **options)
    assert both.num_codes.tolist() == pipe._segment("poem").lengths(pipe._segment("poem").encode(poems)).tolist()
    alone = pipe.score("title->poem", inputs={"title": "the end", "poem": poems[1]}, generator=seeds(0)[0], **options)
    assert float(both.nll[1]) == pytest.approx(float(alone.nll[0]), rel=1e-5)
    assert (both.bits_per_code > 0).all() and (both.standard_error >= 0).all()
    probabilities = pipe.classify(inputs={"title": "the end"}, labels=poems, output="poem", **options).probabilities
    assert probabilities.shape == (1, 2) and float(probabilities.sum()) == pytest.approx(1)


def test_codes_of_texts_of_several_lengths_are_one_tensor(pipe, words):
    codes = pipe.encode_prompt(["once upon a time there was a king", "a"], segment="poem")
    assert isinstance(codes, torch.Tensor) and len(codes) == 2 and codes[1, -1] == words.eos_token_id


def test_codes_of_texts_stand_for_them_in_any_length(pipe, words):
    """A text's padding is no part of it, whichever way it comes; and what is drawn goes in again."""
    titles, poems = ["a king", "the end of a time and a king"], ["once upon a time there was", "a"]
    title, poem = (pipe._segment(name).encode(texts) for name, texts in (("title", titles), ("poem", poems)))
    assert (title[0] == words.eos_token_id).sum() > 4  # more than a block of padding
    options = {"output": "poem", "output_type": "latent", "guidance_scale": 2.0, "gen_length": 8}
    drawn = [
        pipe(inputs={"title": one}, generator=seeds(1, 2), **options).segments["poem"]
        for one in (titles, title, list(title))
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    scores = [
        pipe.score("title->poem", inputs={"title": a, "poem": b}, num_samples=2, generator=seeds(0)[0])
        for a, b in ((titles, poems), (title, poem))
    ]
    assert torch.equal(scores[0].nll, scores[1].nll) and torch.equal(scores[0].num_codes, scores[1].num_codes)
    assert torch.equal(
        pipe.classify(inputs={"poem": poems}, output="kind").probabilities,
        pipe.classify(inputs={"poem": poem}, output="kind").probabilities,
    )
    again = pipe.score("title->poem", inputs={"title": titles, "poem": drawn[0]}, num_samples=2)
    assert (again.num_codes <= drawn[0].shape[1]).all() and again.nll.isfinite().all()
    pipe(inputs={"poem": drawn[0][:, :7]}, output="title")  # no whole blocks
    endless = torch.full((1, 12), 11)  # a text that was cut has no end
    assert pipe.score("->poem", inputs={"poem": endless}, num_samples=2).num_codes.tolist() == [12]
    pipe.tokenizer = None
    with pytest.raises(ValueError, match="needs the component tokenizer"):
        pipe(inputs={"poem": poem}, output="kind")


def test_texts_of_any_length_are_a_gallery(pipe, tmp_path):
    """By texts or their codes, whatever else is in it; one of a pipeline with another tokenizer is refused."""
    poems = ["a king", "once upon a time there was a king", "the end of a time"]
    options = {"top_k": 3, "shortlist": 3}
    gallery = pipe.index(inputs={"poem": poems}, query="title")
    found = pipe.retrieve(["the end", "a king and a daughter"], gallery, **options)
    by_codes = pipe.index(inputs={"poem": pipe._segment("poem").encode(poems)}, query="title")
    again = pipe.retrieve(pipe._segment("title").encode(["the end", "a king and a daughter"]), by_codes, **options)
    assert torch.equal(found.scores, again.scores) and torch.equal(found.indices, again.indices)
    alone = pipe.retrieve("the end", pipe.index(inputs={"poem": poems[:1]}, query="title"))
    score = found.scores[0, found.indices[0].tolist().index(0)]
    assert float(alone.scores[0, 0]) == pytest.approx(float(score), abs=1e-4)
    gallery.save(tmp_path / "g.safetensors")
    loaded = type(gallery).load(tmp_path / "g.safetensors")
    again = pipe.retrieve(["the end", "a king and a daughter"], loaded, **options)
    assert torch.equal(again.scores, found.scores)
    pipe.tokenizer = train_text_tokenizer(["other words"] * 9, 300)
    with pytest.raises(ValueError, match="another tokenizer of 'poem'"):
        pipe.retrieve("the end", gallery)


def test_candidates_that_are_exact_are_classified_by_the_chain_rule(words):
    """With blocks of one token there is one mask a block, and the bound is the likelihood itself."""
    pipe = make(words)
    config = {**pipe.transformer.config}
    config["segments"] = {n: {**one, "block_length": 1} if "block_length" in one else one
                          for n, one in config["segments"].items()}  # fmt: skip
    transformer = VQDiTTransformer2DModel.from_config(config).eval()
    transformer.load_state_dict(pipe.transformer.state_dict())
    pipe.transformer = transformer
    poems, title = ["a king", "once upon a time", "the end"], pipe._segment("title").encode(["a daughter"])
    expected = []
    with torch.no_grad():
        for text in poems:
            (codes,), total = pipe._segment("poem").encode([text]), 0.0
            for given, sign in ((transformer.encode_prefix({"title": title}), 1), (None, -1)):
                for code in codes:
                    logits = transformer({"poem": torch.full((1, 1), len(words))}, prefix=given).sample["poem"]
                    total += sign * float(logits[0, 0].log_softmax(-1)[code])
                    given = transformer.extend_prefix(given, {"poem": code.view(1, 1)})
            expected.append(total)
    found = pipe.classify(inputs={"title": title}, labels=poems, output="poem", num_samples=2).probabilities
    torch.testing.assert_close(found[0], torch.tensor(expected).softmax(0), atol=1e-4, rtol=1e-3)


BLANKS = {
    "inputs['poem']": lambda pipe, text: pipe.score("->poem", inputs={"poem": text}, num_samples=2),
    "inputs['title']": lambda pipe, text: pipe.score("title->poem", inputs={"title": text, "poem": "a"}),
    "labels": lambda pipe, text: pipe.classify(inputs={"title": "a"}, labels=["a", text], output="poem"),
    "query": lambda pipe, text: pipe.retrieve(text, pipe.index(inputs={"poem": ["a", "the"]}, query="title")),
}
BLANKS["inputs['poem'] "] = lambda pipe, text: pipe.index(inputs={"poem": ["a", text]}, query="title")
BLANKS["inputs['title'] "] = lambda pipe, text: pipe.classify(
    inputs={"title": text}, labels=["a", "the"], output="poem"
)


@pytest.mark.parametrize("argument", BLANKS)
def test_what_is_known_whole_has_nothing_to_fill_in(pipe, argument):
    with pytest.raises(
        ValueError, match=rf"{re.escape(argument.strip())}=.*<mask>.* has <mask>, which is for what is"
    ):
        BLANKS[argument](pipe, "a <mask> king")
    BLANKS[argument](pipe, "once a king")
