"""Retrieval against sums that are computed plainly, and its index on disk."""

import math
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_vqdit import GalleryIndex
from diffusers_vqdit.likelihood import gallery as gallery_module
from diffusers_vqdit.likelihood import retrieval
from diffusers_vqdit.likelihood.retrieval import build_index, directions, retrieve
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


@pytest.mark.parametrize("fitted", [1024, 5])
@pytest.mark.parametrize("segment", ["image", "text"])
def test_a_gallery_runs_the_model_once_an_item_and_gives_what_a_second_run_would(
    transformer, segment, fitted, monkeypatch
):
    monkeypatch.setattr(retrieval, "FIT_SIZE", fitted)
    gallery = items(segment, 9)
    query = {"image": "text", "text": "image"}[segment]
    original, rows = retrieval._vectors, []
    monkeypatch.setattr(retrieval, "_vectors", lambda *a: rows.append(len(a[3])) or original(*a))
    index = build_index(transformer, gallery, segment, query, batch_size=4)
    assert sum(rows) == 9
    again = original(transformer, Task.parse(index.way), segment, gallery)
    chosen = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:fitted]
    features = (again - again[chosen].mean(0)) @ index.basis.float()
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
    monkeypatch.setattr(gallery_module, "find_spec", lambda name: None)
    monkeypatch.setattr(gallery_module, "SEARCH_CHUNK", 6)
    assert torch.equal(index.search(queries, 7), expected)


def test_faiss_finds_what_matrix_products_find(transformer):
    pytest.importorskip("faiss")
    index = build_index(transformer, items("text", 40), "text", "image")
    queries = torch.randn(5, index.features.shape[1], generator=torch.Generator().manual_seed(2))
    found = index.search(queries, 7)
    assert index._faiss.ntotal == 40
    scores = queries @ index.features.float().T + index.bias
    torch.testing.assert_close(scores.gather(1, found), scores.topk(7).values, rtol=1e-4, atol=1e-3)


def test_candidates_on_several_shortlists_are_computed_once(transformer, monkeypatch):
    index = build_index(transformer, items("image", 6), "image", "text")
    sizes = []
    original = transformer.encode_prefix
    monkeypatch.setattr(
        transformer,
        "encode_prefix",
        lambda given, *masks: sizes.append(len(next(iter(given.values())))) or original(given, *masks),
    )
    retrieve(transformer, items("text", 4, seed=1), index, top_k=1, shortlist=6)
    assert sizes == [4, 6]


def test_marginals_are_computed_once_for_a_gallery(transformer, monkeypatch):
    transformer.register_to_config(tasks=[*transformer.config.tasks, "->text"])
    index = build_index(transformer, items("image", 6), "image", "text")
    original, free = retrieval.all_masked, []

    def counted(model, segment, given=None, *options, **shape):
        free.extend([segment] if given is None else [])
        return original(model, segment, given, *options, **shape)

    monkeypatch.setattr(retrieval, "all_masked", counted)
    first, second = (retrieve(transformer, items("text", 2, seed=1), index, top_k=3, shortlist=6) for _ in range(2))
    assert sorted(free) == ["image", "text"]
    assert torch.equal(first.indices, second.indices) and torch.equal(first.scores, second.scores)


def test_a_gallery_is_of_one_scale_of_a_lora(transformer):
    peft = pytest.importorskip("peft")
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    index = build_index(transformer, items("image", 6), "image", "text")
    query = items("text", 1)
    retrieve(transformer, query, index, top_k=1, shortlist=2)
    for change in (lambda: transformer.set_adapters(["default"], [0.5]), transformer.disable_adapters):
        change()
        with pytest.raises(ValueError, match="another model"):
            retrieve(transformer, query, index, top_k=1, shortlist=2)


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


STRINGS = ("segment", "query", "way", "model")


def damaged(tensors, strings):
    """Galleries that are not whole: what is wrong, and the tensors and strings."""
    for name in tensors:
        yield name, {key: value for key, value in tensors.items() if key != name}, strings
        yield name, {**tensors, name: tensors[name].bool()}, strings
        yield name, {**tensors, name: tensors[name][None]}, strings
        if name != "codes":
            yield name, {**tensors, name: tensors[name][:, :-1] if name == "features" else tensors[name][:-1]}, strings
            for value in (math.nan, math.inf):
                yield name, {**tensors, name: torch.full_like(tensors[name], value)}, strings
            yield name, {**tensors, name: torch.zeros_like(tensors[name], dtype=torch.int32)}, strings
    for name in STRINGS:
        yield name, tensors, {key: value for key, value in strings.items() if key != name}
        yield name, tensors, {**strings, name: ""}
    for value in ("text", "image->image", "text->label", "->image", "x->y"):
        yield "way", tensors, {**strings, "way": value}
    yield "way", tensors, {**strings, "query": "image"}
    for value in (tensors["codes"] - 100, tensors["codes"][:0], tensors["codes"].float(), tensors["codes"].flatten()):
        yield "codes", {**tensors, "codes": value}, strings


def test_a_damaged_gallery_is_refused_by_the_name_of_its_field(transformer, tmp_path):
    path = tmp_path / "gallery.safetensors"
    build_index(transformer, items("image", 8), "image", "text").save(path)
    index, tensors = GalleryIndex.load(path), load_file(path)
    strings = {name: getattr(index, name) for name in STRINGS}
    count = 0
    for name, some, texts in damaged(tensors, strings):
        if name == "basis" and some.get("basis") is not None and some["basis"].shape[0] == len(tensors["basis"]) - 1:
            continue  # told when it meets the model, below
        save_file({key: value.contiguous() for key, value in some.items()}, path, metadata=texts)
        with pytest.raises(ValueError, match=name) as error:
            GalleryIndex.load(path)
        assert str(path) in str(error.value)
        count += 1
    assert count >= 35
    index.basis = index.basis[:-1]
    with pytest.raises(ValueError, match="basis of"):
        retrieve(transformer, items("text", 2), index, top_k=1, shortlist=1)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_is_not_whole_is_named(transformer, tmp_path, share):
    path = tmp_path / "gallery.safetensors"
    build_index(transformer, items("image", 8), "image", "text").save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="gallery.safetensors' is no whole"):
        GalleryIndex.load(path)


@pytest.mark.parametrize("path", [3, None, "", "no-such-file", "."])
def test_what_is_no_path_to_a_gallery_is_named(transformer, path):
    with pytest.raises(ValueError, match="path="):
        GalleryIndex.load(path)
    if path != "no-such-file":
        with pytest.raises(ValueError, match="path="):
            build_index(transformer, items("image", 2), "image", "text").save(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("top_k", value) for value in (0, -1, 9, 1.5, "1", True, None)),
        *(("shortlist", value) for value in (0, 1, 2.5, "9", True, None)),
        *(("batch_size", value) for value in (0, -1, 1.5, None)),
        *(("gallery", value) for value in (None, "gallery.safetensors", {})),
        *(("query", value) for value in (None, "a dot", torch.zeros(2, 12), torch.zeros(2, 4, 4, dtype=torch.int64))),
        *(("query", torch.full((1, 12), value)) for value in (-1, 64)),
        ("query", torch.zeros(0, 12, dtype=torch.int64)),
    ],
)
def test_bad_arguments_of_retrieve_are_named(transformer, name, value):
    index = build_index(transformer, items("image", 8), "image", "text")
    given = {"query": items("text", 2), "gallery": index, "top_k": 2, "shortlist": 4, "batch_size": 2, name: value}
    with pytest.raises(ValueError, match=name):
        retrieve(transformer, given.pop("query"), given.pop("gallery"), **given)


def test_bad_arguments_of_index_and_search_are_named(transformer):
    for codes in (None, torch.zeros(2, 4, 4), items("text", 2), items("image", 2) + 32, items("image", 2)[:0]):
        with pytest.raises(ValueError, match="codes"):
            build_index(transformer, codes, "image", "text")
    index = build_index(transformer, items("image", 8), "image", "text")
    rank = index.features.shape[1]
    for queries in (None, torch.zeros(rank), torch.zeros(1, rank + 1), torch.full((1, rank), math.nan)):
        with pytest.raises(ValueError, match="queries"):
            index.search(queries, 1)
    for count in (0, 9, 1.5, None, True):
        with pytest.raises(ValueError, match="count"):
            index.search(torch.zeros(1, rank), count)


def test_threads_share_a_model(transformer):
    """Each thread's states are its own, though the head is one."""
    given = [items("text", 2, seed=seed) for seed in range(4)]
    expected = [retrieval.all_masked(transformer, "image", {"text": codes})[0] for codes in given]
    wrong = []

    def work(number):
        for _ in range(20):
            states = retrieval.all_masked(transformer, "image", {"text": given[number]})[0]
            if not torch.equal(states, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_gallery_of_another_tokenizer_or_a_damaged_one_is_refused(pipeline, make_pipeline, tmp_path):
    pictures = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    gallery = pipeline.index(image=pictures)
    gallery.save(tmp_path / "gallery.safetensors")
    loaded = GalleryIndex.load(tmp_path / "gallery.safetensors")
    assert loaded.tokenizers == gallery.tokenizers and len(pipeline.retrieve("a dot", loaded, top_k=2).indices[0]) == 2
    pipeline.image_vq = make_pipeline(7).image_vq
    with pytest.raises(ValueError, match="indexed with another tokenizer of 'image'"):
        pipeline.retrieve("a dot", loaded, top_k=2)
    whole = (tmp_path / "gallery.safetensors").read_bytes()
    size, refused = len(whole), 0
    for place in range(size - 1, size - 400, -7):  # among the tensors
        (tmp_path / "gallery.safetensors").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="gallery.safetensors"):
            GalleryIndex.load(tmp_path / "gallery.safetensors")
        refused += 1
    assert refused > 50
