"""All that takes codes takes them as ever where a position holds several: samplers, likelihood, retrieval."""

import itertools
import math

import pytest
import torch

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
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


@torch.no_grad()
def exact_distribution(model, segment, steps, scheduler):
    """By summing over all paths: the probabilities of all codes (K + 1,) * N after ancestral sampling."""
    size, shape = segment["vocab_size"], segment["shape"]
    states = list(itertools.product(range(size + 1), repeat=math.prod(shape)))
    log_p = model({"image": torch.tensor(states).view(-1, *shape)}).sample["image"].double().log_softmax(-1)
    p = dict(zip(states, log_p.exp().tolist(), strict=True))
    ratios = scheduler.mask_ratio(torch.arange(steps + 1, dtype=torch.float64) / steps).tolist()
    now = {states[-1]: 1.0}
    for left in range(steps, 0, -1):
        stay, later = ratios[left - 1] / ratios[left], {}
        for state, weight in now.items():
            options = [
                [(size, stay), *((code, (1 - stay) * p[state][i][code]) for code in range(size))]
                if value == size
                else [(value, 1.0)]
                for i, value in enumerate(state)
            ]
            for chosen in itertools.product(*options):
                key = tuple(code for code, _ in chosen)
                later[key] = later.get(key, 0.0) + weight * math.prod(chance for _, chance in chosen)
        now = later
    return {state: weight for state, weight in now.items() if size not in state}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("segment", TINY.values(), ids=TINY)
def test_samples_have_the_exact_distribution(segment, steps):
    model, scheduler, draws = tiny(segment), MaskedDiffusionScheduler(sampler="ancestral"), 6000
    expected = exact_distribution(model, segment, steps, scheduler)
    assert sum(expected.values()) == pytest.approx(1)
    uniform = segment["vocab_size"] ** -math.prod(segment["shape"])
    assert max(expected.values()) > 1.3 * uniform  # another distribution could be told from it
    length = math.prod(segment["shape"])
    scheduler.set_timesteps(steps)
    for event_driven in (False, True):
        generator = torch.Generator().manual_seed(0)
        sample, event = torch.full((draws, length), segment["vocab_size"]), None
        for timestep in scheduler.timesteps:
            revealed = None
            if event_driven:
                event = scheduler.next_event(timestep, sample == segment["vocab_size"], event, generator=generator)
                revealed = event.revealed
            with torch.no_grad():
                logits = model({"image": sample.view(draws, *segment["shape"])}).sample["image"]
            sample = scheduler.step(logits, timestep, sample, revealed=revealed, generator=generator).prev_sample
        found, counts = sample.unique(dim=0, return_counts=True)
        counts = {tuple(one): count for one, count in zip(found.tolist(), counts.tolist(), strict=True)}
        assert set(counts) <= set(expected)
        common = {x: p for x, p in expected.items() if draws * p >= 5}  # for the statistic to be chi-squared
        pairs = [(counts.get(x, 0), p) for x, p in common.items()]
        if len(common) < len(expected):
            pairs.append((draws - sum(count for count, _ in pairs), 1 - sum(p for _, p in pairs)))
        chi_square = sum((count - draws * p) ** 2 / (draws * p) for count, p in pairs)
        freedom = len(pairs) - 1
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


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


SAMPLERS = [
    {"sampler": "ancestral"},
    {"sampler": "ancestral", "remask": 0.3},
    {"sampler": "confidence"},
    {"sampler": "halton"},
    {"sampler": "entropy_bound", "entropy_bound": 2.0},
]


@pytest.mark.parametrize("options", SAMPLERS)
def test_every_sampler_draws_a_row_as_alone_and_keeps_known_codes(options):
    model = make(tasks=["->image", "label->image"])
    pipeline = VQDiTPipeline(model, MaskedDiffusionScheduler(**options), labels=list("abcde"))
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randint(30, (3, 4, 4))
    latents[0], latents[1, 1:3, ::2] = 30, 30  # nothing is known, a part of some patches is, all is
    arguments = {"output_type": "latent", "num_inference_steps": 5}

    def run(rows, scale):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        labels = ["abc"[row] for row in rows]
        start = latents[list(rows)]
        return pipeline(class_label=labels, latents=start, generator=generators, guidance_scale=scale, **arguments)

    batch = run(range(3), 2.0).images
    assert batch.max() < 30 and torch.equal(batch[latents < 30], latents[latents < 30])
    for row in range(3):
        assert torch.equal(run([row], 2.0).images[0], batch[row])
    one = run(range(3), 1.0).images
    model.register_to_config(tasks=["label->image"])  # can't be guided at all
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    assert torch.equal(
        pipeline(class_label=["a", "b", "c"], latents=latents, generator=generators, **arguments).images, one
    )
