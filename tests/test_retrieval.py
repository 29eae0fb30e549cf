"""Retrieval against sums that are computed plainly, and its index on disk."""

import pytest
import torch
from safetensors.torch import save_file

from diffusers_vqdit import GalleryIndex, retrieval
from diffusers_vqdit.retrieval import build_index, directions, retrieve
from diffusers_vqdit.tasks import Task


SHAPES = {"text": (64, 12), "image": (32, 4, 4)}


def items(segment, count, seed=0):
    size, *shape = SHAPES[segment]
    return torch.randint(size, (count, *shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def log_p(transformer, generated, codes, given=None):
    """Sum over the positions of log p(code), all of them masked: a plain loop over one item."""
    size, *shape = SHAPES[generated]
    given = None if given is None else {name: value[None] for name, value in given.items()}
    logits = transformer({generated: torch.full((1, *shape), size)}, given=given).sample[generated][0]
    flat = codes.flatten().tolist()
    return sum(float(logits[i].log_softmax(-1)[code]) for i, code in enumerate(flat))


def plain_scores(transformer, query_segment, queries, segment, gallery):
    """PMI in both directions; the query's marginal is left out where the checkpoint doesn't know it."""
    tasks = transformer.config.tasks
    scores = torch.zeros(len(queries), len(gallery))
    for i, query in enumerate(queries):
        for j, item in enumerate(gallery):
            scores[i, j] = log_p(transformer, query_segment, query, {segment: item})
            if f"->{query_segment}" in tasks:
                scores[i, j] -= log_p(transformer, query_segment, query)
            if f"->{segment}" in tasks:
                scores[i, j] += log_p(transformer, segment, item, {query_segment: query})
                scores[i, j] -= log_p(transformer, segment, item)
    return scores


@pytest.mark.parametrize(("query", "segment"), [("text", "image"), ("image", "text")])
@pytest.mark.parametrize("marginal", [False, True])
def test_a_shortlist_of_the_whole_gallery_ranks_as_plain_sums_do(transformer, query, segment, marginal):
    if marginal:
        transformer.register_to_config(tasks=[*transformer.config.tasks, "->text"])
    gallery, queries = items(segment, 9), items(query, 3, seed=1)
    index = build_index(transformer, gallery, segment, query, batch_size=4)
    output = retrieve(transformer, queries, index, top_k=9, shortlist=9, batch_size=2)
    expected = plain_scores(transformer, query, queries, segment, gallery).sort(dim=1, descending=True)
    assert torch.equal(output.indices, expected.indices)
    torch.testing.assert_close(output.scores, expected.values, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("query", "segment"), [("text", "image"), ("image", "text")])
def test_features_are_the_pmi_up_to_a_constant_of_the_query(transformer, query, segment):
    # As many components as items lose nothing; float16 rounds.
    gallery, queries = items(segment, 9), items(query, 3, seed=1)
    index = build_index(transformer, gallery, segment, query)
    assert index.way == "text->image" and index.features.dtype == torch.float16 and index.codes.dtype == torch.int16
    way = Task.parse(index.way)
    expected = torch.zeros(3, 9)
    for i, one in enumerate(queries):
        for j, item in enumerate(gallery):
            given, generated = (one, item) if way.given == (query,) else (item, one)
            expected[i, j] = log_p(transformer, "image", generated, {"text": given})
            expected[i, j] -= log_p(transformer, "image", generated)
    vectors = retrieval._vectors(transformer, way, query, queries)
    if way.given == (query,):
        vectors = vectors - retrieval.all_masked(transformer, "image")[0].flatten(1)
    scores = vectors @ index.basis.float() @ index.features.float().T + index.bias
    scores, expected = (value - value.mean(1, keepdim=True) for value in (scores, expected))
    assert expected.std() > 0.1
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.02 * float(expected.std()))


@pytest.mark.parametrize("segment", ["image", "text"])
def test_a_small_gallery_runs_the_model_once_an_item_and_gives_what_a_second_run_would(
    transformer, segment, monkeypatch
):
    gallery = items(segment, 9)
    query = {"image": "text", "text": "image"}[segment]
    original, rows = retrieval._vectors, []
    monkeypatch.setattr(retrieval, "_vectors", lambda *a: rows.append(len(a[3])) or original(*a))
    index = build_index(transformer, gallery, segment, query, batch_size=4)
    assert sum(rows) == 9
    again = original(transformer, Task.parse(index.way), segment, gallery)
    features = (again - again.mean(0)) @ index.basis.float()
    torch.testing.assert_close(index.features.float(), features, rtol=1e-2, atol=1e-2)


def test_states_and_head_give_the_log_p_of_the_model(transformer):
    given = {"text": items("text", 2)}
    states, table = retrieval.all_masked(transformer, "image", given)
    with torch.no_grad():
        logits = transformer({"image": torch.full((2, 4, 4), 32)}, given=given).sample["image"]
        torch.testing.assert_close(transformer.heads["image"](states), logits)
    torch.testing.assert_close(table, logits.log_softmax(-1))
    assert not transformer.heads["image"]._forward_pre_hooks


def test_a_saved_index_finds_the_same(transformer, tmp_path):
    index = build_index(transformer, items("image", 8), "image", "text")
    index.save(tmp_path / "gallery.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["gallery.safetensors"]
    loaded = GalleryIndex.load(tmp_path / "gallery.safetensors")
    for name in ("codes", "features", "bias", "basis"):
        assert torch.equal(getattr(loaded, name), getattr(index, name))
    queries = items("text", 2, seed=1)
    first, second = (retrieve(transformer, queries, one, top_k=3, shortlist=4) for one in (index, loaded))
    assert torch.equal(first.indices, second.indices) and torch.equal(first.scores, second.scores)


def test_another_file_is_no_index(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no index of a gallery"):
        GalleryIndex.load(tmp_path / "model.safetensors")


def test_search_in_chunks_and_by_faiss_is_one_matrix_product(transformer, monkeypatch):
    index = build_index(transformer, items("text", 40), "text", "image")  # with a bias
    queries = torch.randn(5, index.features.shape[1], generator=torch.Generator().manual_seed(2))
    expected = (queries @ index.features.float().T + index.bias).topk(7).indices
    monkeypatch.setattr(retrieval, "find_spec", lambda name: None)
    monkeypatch.setattr(retrieval, "SEARCH_CHUNK", 6)
    assert torch.equal(index.search(queries, 7), expected)


def test_faiss_finds_what_matrix_products_find(transformer):
    pytest.importorskip("faiss")
    index = build_index(transformer, items("text", 40), "text", "image")
    queries = torch.randn(5, index.features.shape[1], generator=torch.Generator().manual_seed(2))
    found = index.search(queries, 7)
    scores = queries @ index.features.float().T + index.bias
    torch.testing.assert_close(scores.gather(1, found), scores.topk(7).values, rtol=1e-4, atol=1e-3)


def test_candidates_on_several_shortlists_are_computed_once(transformer, monkeypatch):
    index = build_index(transformer, items("image", 6), "image", "text")
    sizes = []
    original = transformer.encode_prefix
    monkeypatch.setattr(
        transformer, "encode_prefix", lambda given: sizes.append(len(next(iter(given.values())))) or original(given)
    )
    retrieve(transformer, items("text", 4, seed=1), index, top_k=1, shortlist=6)
    assert sizes == [4, 6]


def test_directions_need_the_marginal_of_the_items():
    tasks = ["text->image", "image->text", "->image"]
    assert directions(tasks, "text", "image") == [Task(("image",), ("text",)), Task(("text",), ("image",))]
    assert directions(tasks, "image", "text") == [Task(("text",), ("image",))]
    with pytest.raises(ValueError, match="it knows ->image"):
        directions(["->image"], "text", "image")


def test_an_index_of_another_model_or_vocabulary_is_refused(transformer):
    index = build_index(transformer, items("image", 4), "image", "text")
    query = items("text", 1)
    transformer.heads["image"].weight.data += 0.01
    with pytest.raises(ValueError, match="another model"):
        retrieve(transformer, query, index, top_k=1, shortlist=2)
    index.codes[0, 0, 0] = 40
    with pytest.raises(ValueError, match="gallery has codes of shape \\(4, 4\\) up to 40"):
        retrieve(transformer, query, index, top_k=1, shortlist=2)
    index.segment = "sketch"
    with pytest.raises(ValueError, match="gallery has the segment 'sketch'"):
        retrieve(transformer, query, index, top_k=1, shortlist=2)
