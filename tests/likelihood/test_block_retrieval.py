"""Galleries and queries of texts by blocks, against sums over their blocks that are computed plainly."""

import itertools

import pytest
import torch

from diffusers_vqdit import GalleryIndex, VQDiTTransformer2DModel
from diffusers_vqdit.likelihood.block_bounds import block_log_probabilities
from diffusers_vqdit.likelihood.retrieval import build_index, directions, retrieve


LENGTH = 2
POEM, TITLE = {"vocab_size": 3, "shape": [6], "block_length": LENGTH}, {"vocab_size": 4, "shape": [4]}
TASKS = ["title->poem", "poem->title", "->poem", "->title", "kind->poem"]


def make(tasks=tuple(TASKS), **options):
    torch.manual_seed(0)
    segments = {"poem": POEM, "title": {**TITLE, "block_length": LENGTH}, "kind": {"vocab_size": 5, "shape": [2, 2]}}
    model = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, segments=segments, tasks=list(tasks), **options
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def texts(size, count, seed=0):
    """Codes (count, 6) and lengths of one to three blocks; what is padding is anything."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(size, (count, 6), generator=generator)
    return codes, LENGTH * torch.randint(1, 4, (count,), generator=generator)


ITEMS = {"poem": lambda count, seed: texts(3, count, seed), "title": lambda count, seed: texts(4, count, seed)}
ITEMS["kind"] = lambda count, seed: (texts(5, count, seed)[0][:, :4].view(count, 2, 2), None)


@torch.no_grad()
def log_p(model, segment, codes, length, given=None):
    """Block after block, each masked whole; or all of what is no text at once."""
    time = torch.ones(1) if model.config.time_conditioned else None
    size, prefix, total = model.config.segments[segment]["vocab_size"], None, 0.0
    if given is not None:
        name, value, count = given
        prefix = model.encode_prefix({name: value[None] if count is None else value[None, :count]})
    parts = [codes] if length is None else codes[:length].split(LENGTH)
    for part in parts:
        logits = model({segment: torch.full_like(part, size)[None]}, timestep=time, prefix=prefix).sample[segment]
        total += float(logits[0].log_softmax(-1).gather(1, part.flatten()[:, None]).sum())
        if length is not None:
            prefix = model.extend_prefix(prefix, {segment: part[None]})
    return total


def plain_scores(model, query, queries, gallery, items):
    scores = torch.zeros(len(queries[0]), len(items[0]), dtype=torch.float64)
    rows = [[(value, None if lengths is None else int(lengths[i])) for i, value in enumerate(codes)]
            for codes, lengths in (queries, items)]  # fmt: skip
    for way in directions(model.config.tasks, query, gallery):
        forward = way.given == (query,)
        marginal = f"->{way.generated[0]}" in model.config.tasks
        for (i, one), (j, other) in itertools.product(enumerate(rows[0]), enumerate(rows[1])):
            made, given = (other, one) if forward else (one, other)
            scores[i, j] += log_p(model, way.generated[0], *made, (way.given[0], *given))
            if marginal:
                scores[i, j] -= log_p(model, way.generated[0], *made)
    return scores


@pytest.mark.parametrize("time_conditioned", [False, True])
@pytest.mark.parametrize(
    ("query", "gallery", "tasks"),
    [
        ("title", "poem", TASKS),
        ("poem", "title", TASKS),
        ("title", "poem", ["title->poem", "->poem"]),
        ("title", "poem", ["poem->title", "->title"]),
        ("title", "poem", ["poem->title"]),
        ("kind", "poem", ["kind->poem", "->poem"]),
        ("kind", "poem", ["poem->kind", "kind->poem", "->poem", "->kind"]),
        ("poem", "kind", ["kind->poem"]),
        ("poem", "kind", ["kind->poem", "poem->kind", "->kind"]),
    ],
)
def test_a_shortlist_of_the_whole_gallery_ranks_as_plain_sums_do(query, gallery, tasks, time_conditioned):
    model = make(tasks, time_conditioned=time_conditioned)
    (queries, lengths), (items, of_items) = ITEMS[query](3, 1), ITEMS[gallery](7, 0)
    expected = plain_scores(model, query, (queries, lengths), gallery, (items, of_items)).sort(1, descending=True)
    index = build_index(model, items, gallery, query, batch_size=3, lengths=of_items)
    mask = None if lengths is None else torch.arange(queries.shape[1]) < lengths[:, None]
    found = retrieve(model, queries, index, top_k=7, shortlist=7, batch_size=2, query_mask=mask)
    torch.testing.assert_close(found.scores.double(), expected.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.indices, expected.indices)
    # A part of them, and what is padding, change no score.
    if of_items is not None:
        items = torch.where(torch.arange(6) < of_items[:, None], items, 0)
    index = build_index(model, items, gallery, query, lengths=of_items)
    again = retrieve(model, queries[:1], index, top_k=3, shortlist=5, query_mask=None if mask is None else mask[:1])
    places = {int(item): float(score) for item, score in zip(found.indices[0], found.scores[0], strict=True)}
    for item, score in zip(again.indices[0], again.scores[0], strict=True):
        assert float(score) == pytest.approx(places[int(item)], abs=1e-4)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("given", [None, "title"])
def test_texts_of_so_many_blocks_have_probabilities_that_sum_to_one(blocks, given):
    model = make()
    every = torch.tensor(list(itertools.product(range(3), repeat=blocks * LENGTH)))
    prefix = None if given is None else model.encode_prefix({"title": texts(4, 1, 2)[0][:, :4]})
    lengths = torch.full((len(every),), every.shape[1])
    found = block_log_probabilities(model, "poem", every, lengths, prefix, batch_size=50)
    assert float(found.double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_a_saved_gallery_of_texts_finds_the_same(tmp_path):
    model, (items, lengths), path = make(), texts(3, 5), tmp_path / "g.safetensors"
    index = build_index(model, items, "poem", "title", lengths=lengths)
    index.save(path)
    loaded = GalleryIndex.load(path)
    assert torch.equal(loaded.lengths, index.lengths) and loaded.lengths.tolist() == lengths.tolist()
    queries = texts(4, 2, 1)[0]
    options = {"top_k": 5, "shortlist": 5}
    assert torch.equal(
        retrieve(model, queries, loaded, **options).scores, retrieve(model, queries, index, **options).scores
    )
    whole = build_index(model, items, "poem", "title")
    assert whole.lengths.tolist() == [6] * 5
    for wrong in (lengths[:3], lengths.float(), lengths * 0, lengths + 6, "x"):
        with pytest.raises(ValueError, match=r"lengths=.* must be integers \(5,\) in \[1, 6\]"):
            GalleryIndex(**{**vars_of(index), "lengths": wrong})
    other = {**vars_of(index), "lengths": None}
    with pytest.raises(ValueError, match="index the gallery with this model"):
        retrieve(model, queries, GalleryIndex(**other), top_k=1, shortlist=1)


def vars_of(index):
    return {name: value for name, value in vars(index).items() if not name.startswith("_")}
