import torch

from diffusers_vqdit.training.evaluation_scores import (
    classification_accuracy,
    embed_texts,
    retrieval_recall,
    text_similarity,
)


def test_similarity_counts_only_captions_with_another_of_their_role():
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    measured = text_similarity(vectors, ["a", "a", "b", "c"], [0, 1, 2, 3])
    assert (measured["value"], measured["count"]) == (1.0, 2)
    measured = text_similarity(vectors, ["a", "b", "a", "b"], [0, 3])
    assert (measured["value"], measured["count"]) == (0.0, 2)


def test_classification_and_retrieval_are_measured_for_what_the_checkpoint_knows(pipeline):
    pictures = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    captions = ["a red apple", "a blue box", "green", "a dot"]
    accuracy = classification_accuracy(pipeline, pictures, captions, ["fruit", "box", "dot", "dot"])
    assert list(accuracy) == ["image->label"] and accuracy["image->label"]["count"] == 4
    recall = retrieval_recall(pipeline, pictures, captions)
    assert recall["text->image"]["recall@5"]["value"] == recall["image->text"]["recall@5"]["value"] == 1.0
    assert embed_texts(pipeline, captions).shape == (4, 16)
