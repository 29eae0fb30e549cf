"""Likelihood and retrieval take codes as ever where a position holds several."""

import itertools
import math

import pytest
import torch

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.likelihood.bounds import negative_elbo
from diffusers_vqdit.likelihood.retrieval import _vectors, all_masked, at_codes, build_index, retrieve
from diffusers_vqdit.tasks import Task


SEGMENTS = {
    "image": {"vocab_size": 30, "shape": [4, 4], "patch": [2, 2]},
    "speech": {"vocab_size": 11, "shape": [5, 3], "patch": [1, 3], "separate_codebooks": True},
    "text": {"vocab_size": 20, "shape": [6], "patch": [3]},
    "label": {"vocab_size": 5, "shape": [1]},
}
CONFIG = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "segments": SEGMENTS}


def make(segments=SEGMENTS, noise=0.1, **options):
    model = VQDiTTransformer2DModel(**{**CONFIG, "segments": segments, **options})
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model.eval()


def draw(name, size):
    return torch.randint(SEGMENTS[name]["vocab_size"], (size, *SEGMENTS[name]["shape"]))


TINY = {
    "codes of one codebook": {"vocab_size": 2, "shape": [2, 2], "patch": [2, 1]},
    "codebooks of a frame": {"vocab_size": 2, "shape": [2, 2], "patch": [1, 2], "separate_codebooks": True},
    "residual codes of a text": {"vocab_size": 2, "shape": [1, 4], "patch": [1, 4], "separate_codebooks": True},
    "residual codes of an image": {
        **{"vocab_size": 2, "shape": [1, 2, 2], "patch": [1, 1, 2]},
        "separate_codebooks": True,
    },
    "a line": {"vocab_size": 3, "shape": [3], "patch": [3]},
    "a video": {"vocab_size": 2, "shape": [2, 1, 2], "patch": [2, 1, 1]},
}


def tiny(segment):
    return make({"image": segment}, noise=0.25, tasks=["->image"])


@pytest.mark.parametrize("segment", TINY.values(), ids=TINY)
def test_the_bound_is_the_brute_force_one_and_bounds_the_exact_likelihood(segment):
    model, size, shape = tiny(segment), segment["vocab_size"], segment["shape"]
    length = math.prod(shape)
    everything = torch.tensor(list(itertools.product(range(size), repeat=length)))  # all samples there are
    sets = [mask for mask in itertools.product([False, True], repeat=length) if any(mask)]
    # The bound weighs all sets of k codes alike, and all k.
    elbo = torch.zeros(len(everything), dtype=torch.float64)
    log_p = {}
    for mask in map(torch.tensor, sets):
        noised = everything.masked_fill(mask, size).view(-1, *shape)
        with torch.no_grad():
            table = model({"image": noised}).sample["image"].double().log_softmax(-1)
        at = table.gather(2, everything[..., None])[..., 0]
        log_p[tuple(mask.tolist())] = at
        count = int(mask.sum())
        one = at[:, mask].sum(1) * length / count
        elbo += one / math.comb(length, count) / length
        actual = negative_elbo(model, {"image": everything.view(-1, *shape)}, None, mask[None]).nll
        torch.testing.assert_close(actual, -one, rtol=1e-5, atol=1e-5)
    # Codes drawn one at a time, in all orders
    likelihood = torch.zeros(len(everything), dtype=torch.float64)
    for order in itertools.permutations(range(length)):
        total = torch.zeros(len(everything), dtype=torch.float64)
        for place in range(length):
            hidden = tuple(i in order[place:] for i in range(length))
            total += log_p[hidden][:, order[place]]
        likelihood += total.exp() / math.factorial(length)
    assert likelihood.sum() == pytest.approx(1)
    assert (elbo <= likelihood.log() + 1e-9).all() and elbo.exp().sum() > 0.5


@pytest.mark.parametrize(("query", "gallery"), itertools.permutations(["image", "speech", "text"], 2))
def test_retrieval_ranks_by_the_likelihoods_of_codes(query, gallery):
    model = make()
    model.register_to_config(tasks=[f"{query}->{gallery}", f"{gallery}->{query}", f"->{gallery}"])
    items, asked = draw(gallery, 6), draw(query, 2)
    # 1. The inner products of the two sides' vectors are the PMI, but for the normalisers.
    way = Task((query,), (gallery,))
    states, table = all_masked(model, gallery, {query: asked})
    free, marginal = all_masked(model, gallery)
    products = (states - free).flatten(1) @ _vectors(model, way, gallery, items).T  # (2, 6)
    pmi = torch.stack([at_codes((one - marginal).expand(6, -1, -1), items.flatten(1)) for one in table])
    rest = products - pmi
    torch.testing.assert_close(rest - rest.mean(1, keepdim=True), torch.zeros(2, 6), atol=1e-3, rtol=1e-3)
    assert pmi.std(1).min() > 0.02
    # 2. What is found has both directions' sums, one code at a time.
    found = retrieve(model, asked, build_index(model, items, gallery, query), top_k=6, shortlist=6)
    backward = all_masked(model, query, {gallery: items})[1]
    whole = pmi + torch.stack([at_codes(backward, one.flatten()[None].expand(6, -1)) for one in asked])
    torch.testing.assert_close(found.scores, whole.sort(1, descending=True).values, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.scores, whole.gather(1, found.indices), atol=1e-3, rtol=1e-3)
