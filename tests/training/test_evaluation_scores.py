from types import SimpleNamespace

import torch

from diffusers_vqdit.training.evaluation_scores import (
    classification_accuracy,
    embed_texts,
    retrieval_recall,
    text_similarity,
)


OWN = (0, 2, 4, 5, 5, 5, 5, 5)  # where each row is found


def test_similarity_counts_only_captions_with_another_of_their_role():
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    measured = text_similarity(vectors, ["a", "a", "b", "c"], [0, 1, 2, 3])
    assert (measured["value"], measured["count"]) == (1.0, 2)
    measured = text_similarity(vectors, ["a", "b", "a", "b"], [0, 3])
    assert (measured["value"], measured["count"]) == (0.0, 2)


def test_similarity_is_no_figure_where_no_emoji_occurs_twice():
    assert text_similarity(torch.eye(2), ["a", "b"], [0, 1]) is None


def test_classification_and_retrieval_are_measured_for_what_the_checkpoint_knows(pipeline):
    pictures = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    captions = ["a red apple", "a blue box", "green", "a dot"]
    told = pipeline.classify(image=pictures.float() / 255, output="label").labels
    others = [{"fruit": "box", "box": "dot", "dot": "fruit"}[name] for name in told]
    for labels, right in ((told, 1.0), (others, 0.0), ([*told[:1], *others[1:]], 0.25)):
        accuracy = classification_accuracy(pipeline, pictures, captions, labels)
        assert list(accuracy) == ["image->label"] and accuracy["image->label"]["count"] == 4
        assert accuracy["image->label"]["value"] == right
    assert embed_texts(pipeline, captions).shape == (4, 16)


def test_recall_is_of_a_query_s_own_row_among_the_first(pipeline, monkeypatch):
    """Of eight rows one is found first, one third, one fifth, and five sixth."""
    found = torch.tensor([[row if place == own else 7 - row for place in range(8)] for row, own in enumerate(OWN)])
    monkeypatch.setattr(pipeline, "retrieve", lambda query, index, **options: SimpleNamespace(indices=found))
    pictures = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    recall = retrieval_recall(pipeline, pictures, [f"{number} dots" for number in range(8)])
    for way in ("text->image", "image->text"):
        assert (recall[way]["recall@1"]["value"], recall[way]["recall@5"]["value"]) == (1 / 8, 3 / 8)
        assert recall[way]["recall@1"]["count"] == 8
