"""`VQDiTPipeline.classify`, `index` and `retrieve`."""

import pytest
import torch

from diffusers_vqdit.likelihood.bounds import stratified_masks


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_labels_have_the_softmax_of_the_label_logits(pipeline, pictures):
    output = pipeline.classify(image=pictures)
    given = {"image": pipeline.encode_image(pictures)}
    with torch.no_grad():
        logits = pipeline.transformer({"label": torch.full((3, 1), 3)}, given=given).sample["label"][:, 0]
    torch.testing.assert_close(output.probabilities, logits.softmax(-1))
    assert output.names == ["fruit", "box", "dot"]
    assert output.labels == [output.names[i] for i in logits.argmax(1).tolist()]


def test_texts_and_both_are_classified_where_the_checkpoint_knows_it(pipeline, pictures):
    with pytest.raises(ValueError, match="'text->label'; it knows text->image"):
        pipeline.classify("a red apple")
    pipeline.transformer.register_to_config(tasks=["text->label", "image+text->label"])
    assert pipeline.classify(["a red apple", "green"]).probabilities.shape == (2, 3)
    both = pipeline.classify(["a red apple", "green", "a dot"], pictures)
    assert both.probabilities.shape == (3, 3)
    with pytest.raises(ValueError, match="one batch size"):
        pipeline.classify(["a red apple", "green"], pictures)


@pytest.mark.parametrize("marginal", [False, True])
def test_texts_of_one_s_own_have_the_softmax_of_plain_bounds(pipeline, pictures, marginal):
    if marginal:
        pipeline.transformer.register_to_config(tasks=[*pipeline.transformer.config.tasks, "->text"])
    labels = ["a red apple", "a blue box", "green", "a dot"]
    output = pipeline.classify(
        image=pictures, labels=labels, num_samples=4, batch_size=3, generator=torch.Generator().manual_seed(5)
    )
    masks, _ = stratified_masks(12, 4, torch.Generator().manual_seed(5))
    text, image = pipeline.encode_prompt(labels), pipeline.encode_image(pictures)
    scores = torch.zeros(3, 4)
    for i in range(3):
        for j in range(4):
            for mask in masks:
                noised = text[j : j + 1].masked_fill(mask, 64)
                sides = [({"image": image[i : i + 1]}, 1.0)] + ([(None, -1.0)] if marginal else [])
                for given, sign in sides:
                    with torch.no_grad():
                        table = pipeline.transformer({"text": noised}, given=given).sample["text"][0].log_softmax(-1)
                    chosen = table[mask].gather(1, text[j, mask][:, None]).sum()
                    scores[i, j] += sign * chosen * 12 / int(mask.sum()) / len(masks)
    torch.testing.assert_close(output.probabilities, scores.softmax(1), rtol=1e-3, atol=1e-5)
    assert output.labels == [labels[i] for i in scores.argmax(1).tolist()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to classify"),
        ({"prompt": "a dot", "labels": ["green", "a dot"]}, "pass image"),
        ({"image": torch.zeros(1, 3, 16, 16), "labels": ["green"]}, "labels=\\['green'\\]"),
        ({"image": torch.zeros(1, 3, 16, 16), "labels": ["green", "green"]}, "different"),
        ({"image": torch.zeros(1, 3, 16, 16), "labels": ["green", " "]}, "' '"),
        ({"image": torch.zeros(1, 3, 16, 16), "labels": ["green", "a dot"], "batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_cannot_be_classified_is_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.classify(**arguments)


def test_one_query_finds_what_it_finds_in_a_batch(pipeline, pictures):
    gallery = pipeline.index(image=pictures, batch_size=2)
    queries = ["a red apple", "green", "a dot"]
    batch = pipeline.retrieve(queries, gallery, top_k=2, shortlist=2)
    for row, query in enumerate(queries):
        alone = pipeline.retrieve(query, gallery, top_k=2, shortlist=2)
        assert torch.equal(alone.indices[0], batch.indices[row])
        torch.testing.assert_close(alone.scores[0], batch.scores[row], rtol=1e-4, atol=1e-4)


def test_pictures_are_queries_of_texts(pipeline, pictures):
    gallery = pipeline.index(["a red apple", "green", "a dot"])
    assert (gallery.segment, gallery.query, len(gallery)) == ("text", "image", 3)
    output = pipeline.retrieve(pictures, gallery, top_k=3)
    assert output.indices.sort(1).values.tolist() == [[0, 1, 2]] * 3
    assert (output.scores.diff(dim=1) <= 0).all()
    pil = pipeline.image_processor.postprocess(pictures * 2 - 1)
    assert pipeline.retrieve(pil, gallery, top_k=1).indices.shape == (3, 1)


def test_wrong_galleries_and_queries_are_named(pipeline, pictures):
    with pytest.raises(ValueError, match="empty list"):
        pipeline.index([])
    with pytest.raises(ValueError, match="prompt or image"):
        pipeline.index()
    gallery = pipeline.index(image=pictures)
    for top_k in (0, 4, 1.0, True):
        with pytest.raises(ValueError, match=f"top_k={top_k}"):
            pipeline.retrieve("green", gallery, top_k)
    assert pipeline.retrieve("green", gallery).indices.shape == (1, 3)  # all of a gallery of fewer than five
    with pytest.raises(ValueError, match="shortlist=1 "):
        pipeline.retrieve("green", gallery, 2, shortlist=1)
    with pytest.raises(ValueError, match="query must be texts"):
        pipeline.retrieve(pictures, gallery, 1)
    with pytest.raises(ValueError, match="must be a GalleryIndex"):
        pipeline.retrieve("green", "gallery.safetensors", 1)
    pipeline.transformer.register_to_config(tasks=["label->image"])
    with pytest.raises(ValueError, match="it knows label->image"):
        pipeline.index(image=pictures)


LOWRES = {"vocab_size": 32, "shape": [4, 4], "shared_with": "image"}


@pytest.fixture
def enlarging(pipeline):
    """Knows small pictures, of half the size of others, in tiles."""
    tasks = [f"{one}->{other}" for one in ("text", "image") for other in ("image_lowres",)]
    tasks += [f"image_lowres->{other}" for other in ("text", "image", "label")]
    tasks += ["->text", "->image", "->image_lowres"]
    transformer = pipeline.transformer.with_segments({"image_lowres": LOWRES})
    transformer.register_to_config(tasks=tasks)
    parts = {**pipeline.components, "transformer": transformer.eval()}
    pipe = type(pipeline)(**parts, labels=pipeline.config.labels, lowres_factor=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("how", ["score", "classify", "candidates", "index", "retrieve"])
def test_pictures_of_several_tiles_are_refused_where_each_is_one_sample(enlarging, pictures, how):
    """Else rows of one picture would stand for another's."""

    def call(small):
        given = {"image_lowres": small}
        if how == "score":
            return enlarging.score("image_lowres->image", image=pictures, inputs=given, num_samples=2)
        if how in ("classify", "candidates"):
            return enlarging.classify(inputs=given, labels=["a dot", "green"] if how == "candidates" else None)
        if how == "index":
            return enlarging.index(inputs=given, query="text")
        return enlarging.retrieve(small, enlarging.index(["a dot", "green"], query="image_lowres"))

    with pytest.raises(ValueError, match="16 x 16 pixels .* one of at most 8 x 8"):
        call(pictures)
    assert call(torch.nn.functional.interpolate(pictures, (8, 8)))


@pytest.mark.parametrize("as_array", [False, True])
def test_a_gallery_in_one_tensor_is_encoded_in_batches(pipeline, monkeypatch, as_array):
    pictures, sizes = torch.rand(5, 3, 16, 16), []
    encode = pipeline.image_vq.encode_codes
    monkeypatch.setattr(pipeline.image_vq, "encode_codes", lambda x: sizes.append(len(x)) or encode(x))
    gallery = pipeline.index(image=pictures.movedim(1, 3).numpy() if as_array else pictures, batch_size=2)
    assert sizes == [2, 2, 1]
    assert torch.equal(gallery.codes, pipeline.index(image=list(pictures)).codes)


def test_an_index_computes_where_the_codes_are(pipeline, pictures):
    """Not on the transformer's device, which is another one while its weights are offloaded."""
    expected, devices = pipeline.index(image=pictures), set()
    kind = type(pipeline.transformer)

    def places(transformer, name, shape, device):
        devices.add(torch.device(device))
        return kind._places(transformer, name, shape, device)

    elsewhere = {"device": torch.device("meta"), "_places": places}
    pipeline.transformer.__class__ = type("Elsewhere", (kind,), elsewhere)
    assert torch.equal(pipeline.index(image=pictures).features, expected.features)
    assert devices == {torch.device("cpu")}


def test_galleries_of_weights_that_are_not_there_are_refused_with_a_sentence(pipeline, pictures):
    gallery = pipeline.index(image=pictures)
    pipeline.transformer.to("meta")
    with pytest.raises(ValueError, match="offloaded layer by layer"):
        pipeline.index(image=pictures)
    pipeline.image_vq.to("meta")
    with pytest.raises(ValueError, match="offloaded layer by layer"):
        pipeline.retrieve("a dot", gallery)
