"""The cache of the generated side: against a pass over all positions whose reused keys and values are put in place."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from diffusers_vqdit import GenerationCacheConfig, VQDiTTransformer2DModel
from diffusers_vqdit.models.attention_processor import rotate
from diffusers_vqdit.models.generation_cache import GenerationCache
from diffusers_vqdit.models.segment_layers import patchify, segment_patch


SIZES, SHAPES = {"image": 32, "text": 64}, {"image": (4, 4), "text": (6,)}
MODELS = {
    "plain": {},
    "rotary": {"use_rotary_positional_embeddings": True},
    "timed": {"time_conditioned": True},
    "patches": {"patch": [2, 2]},
}


class Substituting:
    """Plain attention of one row, in which the keys and values of some positions are those of before."""

    def __init__(self):
        self.kept = None
        self.active = None  # (n,) bool; None: all

    def __call__(self, attn, hidden_states, prefix=None, image_rotary_emb=None, attention_mask=None):
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (rotate(norm(x), image_rotary_emb) for norm, x in ((attn.norm_q, query), (attn.norm_k, key)))
        if self.active is not None:
            key, value = (
                torch.where(self.active[None, :, None, None], new, old)
                for new, old in zip((key, value), self.kept, strict=True)
            )
        self.kept = key, value
        if prefix is not None:
            key, value = torch.cat([prefix[0], key], 1), torch.cat([prefix[1], value], 1)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
        return attn.to_out[0](out.flatten(2)), *self.kept


def make_model(patch=None, **options):
    torch.manual_seed(0)
    image = {"vocab_size": 32, "shape": [4, 4], **({"patch": patch} if patch else {})}
    segments = {"image": image, "text": {"vocab_size": 64, "shape": [6]}, "label": {"vocab_size": 3, "shape": [2]}}
    model = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=3, segments=segments, **options
    )
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return model.eval()


class Reference:
    """One row and one half of guidance, without a batch, a gather or a mask."""

    def __init__(self, model, given):
        self.model, self.given, self.calls = copy.deepcopy(model), given, 0
        self.processors = [Substituting() for _ in model.transformer_blocks]
        for block, processor in zip(self.model.transformer_blocks, self.processors, strict=True):
            block.attn1.set_processor(processor)
        self.prefix = None if given is None else model.encode_prefix(given)

    def __call__(self, codes, time, active):
        """Logits (1, N, K) by segment, of which those of other positions than `active` (n,) mean nothing."""
        for processor in self.processors:
            processor.active = active
        return self.model(codes, timestep=time, prefix=self.prefix).sample


def positions(model, name, value):
    return patchify(value, segment_patch(model.config.segments, name))  # (1, n, P)


def expected_active(model, codes, before, scores, ratio):
    """The positions (n,) of one row that are to be computed, in plain loops."""
    changed, waiting, score = [], [], []
    for name in sorted(codes):
        new, old = (positions(model, name, x)[0] for x in (codes[name], before[name]))
        own = positions(model, name, scores[name].view_as(codes[name]))[0] if scores else torch.zeros(new.shape)
        for place in range(len(new)):
            hidden = new[place] == SIZES[name]
            changed.append(bool((new[place] != old[place]).any()))
            waiting.append(bool(hidden.any()) and not changed[-1])
            score.append(float(own[place][hidden].min()) if waiting[-1] else math.inf)
    order = sorted((place for place, one in enumerate(waiting) if one), key=lambda place: score[place])
    needed = order[: math.ceil(len(order) * (1 - ratio))]
    return torch.tensor([one or place in needed for place, one in enumerate(changed)])


def spread(model, name, where, shape):
    """Which codes (N,) are at positions (n,) of a segment."""
    patch = segment_patch(model.config.segments, name)
    marks = positions(model, name, torch.arange(math.prod(shape)).view(1, *shape))[0]  # (n, P), the codes' numbers
    found = torch.zeros(math.prod(shape), dtype=torch.bool)
    found[marks[where].flatten()] = True
    assert marks.shape[1] == math.prod(patch)
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("names", "ratio"), [(["image"], 0.0), (["image"], 0.6), (["image", "text"], 0.4)])
@pytest.mark.parametrize("guided", [False, True])
def test_a_pass_is_that_over_all_positions_with_keys_and_values_of_before(kind, names, ratio, guided):
    model, interval, size = make_model(**MODELS[kind]), 3, 3
    given = {"label": torch.randint(3, (size, 2))} if guided else None
    cache = GenerationCache(GenerationCacheConfig(refresh_interval=interval, cache_ratio=ratio))
    codes = {name: torch.full((size, *SHAPES[name]), SIZES[name]) for name in names}
    codes["image"][1, :2] = torch.randint(32, (2, 4))
    rows, halves = torch.arange(size), 2 if guided else 1
    reference = {}  # (row, half) -> the reference, what it saw last, its logits
    for call in range(7):
        if call == 4:
            rows = torch.tensor([0, 2])  # the second has left
        cache.keep(rows)
        part = {name: value[rows] for name, value in codes.items()}
        time = torch.full((len(rows),), 1 - call / 8)
        prefix = None if given is None else model.encode_prefix({name: x[rows] for name, x in given.items()})
        found = model(part, timestep=time, prefix=prefix, with_unconditional=guided, cache=cache).sample
        assert all(len(x) == halves * len(rows) for x in found.values())
        for index, row in enumerate(rows.tolist()):
            own = {name: value[row : row + 1] for name, value in codes.items()}
            active = None
            for half in range(halves):
                if (row, half) not in reference:
                    passed = {name: x[row : row + 1] for name, x in given.items()} if guided and half == 0 else None
                    reference[row, half] = [Reference(model, passed), None, None, None]
                state = reference[row, half]
                if call % interval and half == 0:
                    active = expected_active(model, own, state[1], state[3], ratio)
                logits = state[0](own, time[:1], active)
                lengths = [positions(model, name, own[name]).shape[1] for name in sorted(own)]
                places = torch.ones(sum(lengths), dtype=torch.bool) if active is None else active
                for name, place in zip(sorted(own), places.split(lengths), strict=True):
                    hidden = own[name][0].flatten() == SIZES[name]
                    where = hidden & spread(model, name, place, SHAPES[name])
                    if active is not None:
                        logits[name][0, ~where] = state[2][name][0, ~where]
                    told = hidden if ratio else where
                    mine = found[name][index + half * len(rows)]
                    torch.testing.assert_close(mine[told], logits[name][0][told], atol=2e-4, rtol=1e-3)
                state[1] = {name: value.clone() for name, value in own.items()}
                state[2] = {name: value.clone() for name, value in logits.items()}
                state[3] = {name: value[0].amax(-1) for name, value in logits.items()} if ratio else None
        for name, value in codes.items():  # reveal some codes, of each row others
            chosen = (torch.rand(value.shape) < 0.2) & (value == SIZES[name])
            value[chosen] = torch.randint(SIZES[name], (int(chosen.sum()),))


@torch.no_grad()
def test_fewer_positions_are_computed(monkeypatch):
    model, computed = make_model(), []
    forward = type(model.transformer_blocks[0].ff).forward
    kind = type(model.transformer_blocks[0].ff)
    monkeypatch.setattr(kind, "forward", lambda self, x: computed.append(x.shape[1]) or forward(self, x))
    codes = torch.full((1, 4, 4), 32)

    def places(**options):
        computed.clear()
        cache, value = GenerationCache(GenerationCacheConfig(**options)), codes.clone()
        for step in range(4):
            model({"image": value}, cache=cache)
            value[0, step] = 5
        return computed[::3]

    assert places(refresh_interval=1) == [16] * 4
    assert places(refresh_interval=4, cache_ratio=0.0) == [16, 16, 12, 8]  # four were revealed in each call
    assert places(refresh_interval=2, cache_ratio=0.0) == [16, 16, 16, 8]
    assert places(refresh_interval=4, cache_ratio=1.0) == [16, 4, 4, 4]
    assert places(refresh_interval=4, cache_ratio=0.5) == [16, 10, 8, 6]


@torch.no_grad()
def test_what_is_another_run_begins_anew():
    model = make_model()
    codes = {"image": torch.full((2, 4, 4), 32)}
    cache, plain = GenerationCache(GenerationCacheConfig(refresh_interval=100)), model(codes).sample["image"]
    prefix = model.encode_prefix({"label": torch.zeros(2, 2, dtype=torch.int64)})
    cache.keep(torch.tensor([0, 1]))
    assert torch.equal(model(codes, cache=cache).sample["image"], plain)
    both = model(codes, prefix=prefix, with_unconditional=True, cache=cache).sample["image"]  # guided from here
    assert torch.equal(both, model(codes, prefix=prefix, with_unconditional=True).sample["image"])
    cache.keep(torch.tensor([0, 5]))  # a row that was not there
    assert torch.equal(model(codes, cache=cache).sample["image"], plain)
    text = {"text": torch.full((2, 6), 64)}
    assert torch.equal(model(text, cache=cache).sample["text"], model(text).sample["text"])
    with pytest.raises(ValueError, match="give masked or cache, not both"):
        model(codes, masked={"image": torch.ones(2, 16, dtype=torch.bool)}, cache=cache)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("refresh_interval", value) for value in (0, -1, 1.5, True, "2", None)),
        *(("cache_ratio", value) for value in (-0.1, 1.1, math.nan, "0.5", None)),
    ],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        GenerationCacheConfig(**{name: value})
