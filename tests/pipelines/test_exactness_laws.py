"""The laws that hold exactly, for every kind of segment: known codes stay, a sample is its own, guidance of one is
none, a prefix is what is computed anew, and samples by events have the distribution of the plain reverse process.

Models are tiny and random, and of so few codes that distributions are summed over all paths.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from diffusers_vqdit import ImageVQModel, MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.padded_states import PaddedStates
from diffusers_vqdit.schedulers.outputs import MaskedDiffusionEvent


STEPS = 3


def drawn_once(seed: int, size: int, *shape: int) -> torch.LongTensor:
    return torch.randint(size, (3, *shape), generator=torch.Generator().manual_seed(seed))


def first(*lengths: int) -> torch.BoolTensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


STATES = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(1))
CODES = {"given": ({"vocab_size": 3, "shape": [2]}, drawn_once(2, 3, 2))}
STYLE = {"style": ({"vocab_size": 3, "shape": [1]}, drawn_once(3, 3, 1))}
PROMPT = {"prompt": ({"channels": 4, "shape": [3]}, STATES)}
SOURCE = {"source": ({"vocab_size": 2, "shape": [2, 2], "shared_with": "out"}, drawn_once(4, 2, 2, 2))}
WIDE = {"source": ({"vocab_size": 2, "shape": [2, 2], "shared_with": "out"}, drawn_once(5, 2, 1, 4))}
FILM = {"film": ({"vocab_size": 2, "shape": [2, 1, 2], "shared_with": "out"}, drawn_once(6, 2, 2, 1, 2))}
# The code 2 ends a text, and what comes after its block is padding.
TITLE = {
    "title": (
        {"vocab_size": 3, "shape": [4], "block_length": 2, "shared_with": "out"},
        torch.tensor([[0, 2, 2, 2], [1, 0, 1, 2], [2, 2, 2, 2]]),
    )
}
PICTURE = {"modality": "image"}
BUCKETS = {"modality": "image", "buckets": [[2, 2], [1, 4]]}


@dataclass
class Kind:
    """A pipeline that draws the segment ``out`` of what three rows are given.

    Args:
        out: its geometry.
        given: by segment its geometry and the rows' codes or states.
        scales: of guidance, away from one.
        grid: of the codes that are drawn, by default that of the geometry.
        masks: zero at the padding of given rows.
        entries: of the pipeline's segments; by default they have nothing but codes or states.
        call: further arguments of the pipeline's call.
        model: further arguments of the transformer.
    """

    out: dict
    given: dict
    scales: float | dict = 3.0
    grid: tuple = ()
    masks: dict = field(default_factory=dict)
    entries: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.grid or tuple(self.out["shape"])

    @property
    def order(self) -> list[tuple[tuple[str, ...], float]]:
        """The scale of each step of guidance, and all that is given after it."""
        names = tuple(self.given)
        if not isinstance(self.scales, dict):
            return [(names, self.scales)]
        return [(tuple(self.scales)[: index + 1], scale) for index, scale in enumerate(self.scales.values())]

    def part(self, names: tuple[str, ...], rows: list[int]) -> tuple[dict, dict]:
        """Some of what some rows are given without what is padding in all of them, and its masks."""
        values, masks = {}, {}
        for name in names:
            values[name] = self.given[name][1][rows]
            if name in self.masks:
                masks[name] = self.masks[name][rows]
                longest = int(masks[name].sum(1).max())
                values[name], masks[name] = values[name][:, :longest], masks[name][:, :longest]
        return values, masks


SQUARE = {"vocab_size": 2, "shape": [2, 2]}
TEXT = {"vocab_size": 3, "shape": [4], "block_length": 2}
TOKENS = {"modality": "text", "tokenizer": "tokenizer"}
WHOLE = {"eos_early_stop": False}  # so that an end is a code as any other
KINDS = {
    "one code a position": Kind(SQUARE, CODES),
    "patches": Kind({**SQUARE, "patch": [2, 1]}, CODES),
    "patches on a line": Kind({"vocab_size": 3, "shape": [3], "patch": [3]}, CODES),
    "codebooks": Kind({**SQUARE, "patch": [1, 2], "separate_codebooks": True}, CODES),
    "residual codes": Kind(
        {"vocab_size": 2, "shape": [1, 2, 2], "patch": [1, 1, 2], "separate_codebooks": True}, CODES
    ),
    "films of films": Kind(
        {"vocab_size": 2, "shape": [2, 1, 2], "patch": [2, 1, 1]}, FILM, model={"time_conditioned": True}
    ),
    "another size": Kind(
        SQUARE,
        STYLE,
        8.0,
        grid=(1, 4),
        entries={"out": PICTURE},
        call={"height": 2, "width": 8},
        model={"use_rotary_positional_embeddings": True},
    ),
    "a bucket": Kind(SQUARE, WIDE, grid=(1, 4), entries={"out": BUCKETS, "source": BUCKETS}),
    "states": Kind(SQUARE, PROMPT, masks={"prompt": first(3, 1, 2)}),
    "scales of their own": Kind(
        SQUARE,
        {**STYLE, **PROMPT, **SOURCE},
        {"source": 0.5, "prompt": 4.0, "style": 2.0},
        masks={"prompt": first(1, 3, 2)},
        entries={"out": PICTURE, "source": PICTURE},
    ),
    "texts by blocks": Kind(
        TEXT, TITLE, masks={"title": first(2, 4, 2)}, entries={"out": TOKENS, "title": TOKENS}, call=WHOLE
    ),
    "texts by blocks of states": Kind(
        TEXT,
        {**STYLE, **PROMPT},
        {"prompt": 4.0, "style": 2.0},
        masks={"prompt": first(2, 3, 1)},
        entries={"out": TOKENS},
        call=WHOLE,
    ),
}
SAMPLERS = [
    {"sampler": "ancestral"},
    {"sampler": "ancestral", "remask": 0.3},
    {"sampler": "confidence"},
    {"sampler": "halton"},
    {"sampler": "entropy_bound", "entropy_bound": 0.5},
    {"sampler": "threshold", "threshold": 0.6},
]
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def make(kind: Kind, scheduler: MaskedDiffusionScheduler | None = None, *, guided: bool = True) -> VQDiTPipeline:
    """The pipeline of a kind; not `guided`, it knows the task with all that is given alone."""
    names = list(kind.given)
    given = (
        [names] if not guided else [part for n in range(len(names) + 1) for part in itertools.combinations(names, n)]
    )
    torch.manual_seed(0)
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        segments={"out": kind.out, **{name: geometry for name, (geometry, _) in kind.given.items()}},
        tasks=[f"{'+'.join(part)}->out" for part in given],
        **kind.model,
    )
    for parameter in transformer.parameters():
        parameter.data += 0.25 * torch.randn_like(parameter)
    image_vq = ImageVQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        num_vq_embeddings=2,
        sample_size=4,
    )
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    entries = {
        name: {"modality": "states" if "channels" in geometry else "codes"}
        for name, (geometry, _) in {"out": (kind.out, None), **kind.given}.items()
    }
    pipe = VQDiTPipeline(
        transformer.eval(),
        scheduler or MaskedDiffusionScheduler(),
        image_vq if "image" in str(kind.entries) else None,
        tokenizer=tokenizer if "tokenizer" in str(kind.entries) else None,
        segments={**entries, **kind.entries},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: VQDiTPipeline, kind: Kind, rows: list[int], count: int = 1, **options) -> torch.LongTensor:
    """Codes of some rows with a seed each, so many of each row next to one another."""
    values, masks = kind.part(tuple(kind.given), rows)
    values = {
        name: PaddedStates(value, masks.get(name)) if value.is_floating_point() else value
        for name, value in values.items()
    }
    options = {
        **{"output": "out", "output_type": "latent", "num_inference_steps": STEPS, "temperature": 1.0},
        **{"guidance_scale": kind.scales, "num_images_per_prompt": count},
        **{"generator": [torch.Generator().manual_seed(count * row + i) for row in rows for i in range(count)]},
        **kind.call,
        **options,
    }
    return pipe(inputs=values, **options).segments["out"]


# ---------------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("options", SAMPLERS, ids=lambda options: " ".join(map(str, options.values())))
def test_known_codes_stay_and_a_row_is_drawn_as_alone(kind, options):
    pipe, size = make(kind, MaskedDiffusionScheduler(**options)), kind.out["vocab_size"]
    start = drawn_once(7, size, *kind.shape)
    start[0] = size  # nothing is known; of the next row a part is, of the last all
    start[1].flatten()[1::2] = size
    batch = draw(pipe, kind, [0, 1, 2], latents=start)
    assert batch.shape == start.shape and torch.equal(batch[start < size], start[start < size])
    assert 0 <= batch.min() and batch.max() < size
    for row in range(3):
        assert torch.equal(draw(pipe, kind, [row], latents=start[[row]])[0], batch[row])
    assert torch.equal(draw(pipe, kind, [2, 0], latents=start[[2, 0]]), batch[[2, 0]])


@every_kind
@pytest.mark.parametrize("options", SAMPLERS[::2], ids=lambda options: " ".join(map(str, options.values())))
def test_guidance_of_one_is_none(kind, options):
    """As of a pipeline that can't be guided, whose transformer sees all that is given in every call."""
    pipe, alone = (make(kind, MaskedDiffusionScheduler(**options), guided=guided) for guided in (True, False))
    with pytest.raises(ValueError, match="which this checkpoint doesn't know"):
        draw(alone, kind, [0, 1, 2])
    expected = draw(alone, kind, [0, 1, 2], count=4, guidance_scale=None)
    for scale in (1.0, dict.fromkeys(kind.given, 1.0)):
        assert torch.equal(draw(pipe, kind, [0, 1, 2], count=4, guidance_scale=scale), expected)
    assert not torch.equal(draw(pipe, kind, [0, 1, 2], count=4), expected)


@every_kind
@torch.no_grad()
def test_a_prefix_is_what_is_computed_anew(kind, monkeypatch):
    """In every call of a guided run, of two samples a row: each row's without padding, and of the blocks that a text
    has all at once."""
    pipe = make(kind, MaskedDiffusionScheduler(sampler="halton"))
    model, forward, calls = pipe.transformer, pipe.transformer.forward, []

    def record(codes, timestep=None, *, prefix=None, with_unconditional=False, **options):
        output = forward(codes, timestep, prefix=prefix, with_unconditional=with_unconditional, **options)
        calls.append((codes["out"], timestep, prefix, with_unconditional, output.sample["out"]))
        return output

    monkeypatch.setattr(model, "forward", record)
    length = kind.out.get("block_length")
    final = draw(pipe, kind, [0, 1, 2], count=2, **({"gen_length": 3 * length} if length else {}))
    seen = set()
    for codes, timestep, prefix, both, logits in calls:
        before = prefix.offsets.get("out", 0)
        seen.add((frozenset(prefix.names), before))
        for row in range(3):
            two = slice(2 * row, 2 * row + 2)
            anew = prefix_of(model, kind, prefix.names, [row, row], final[two, :before] if before else None)
            arguments = {"out": codes[two]}, timestep[two]
            found, alone = logits.chunk(2) if both else (logits, None)
            expected = forward(*arguments, prefix=anew).sample["out"]
            torch.testing.assert_close(found[two], expected, atol=1e-5, rtol=1e-5)
            if both:
                torch.testing.assert_close(alone[two], forward(*arguments).sample["out"], atol=1e-5, rtol=1e-5)
    blocks = range(0, final.shape[1], length) if length else [0]
    assert {(frozenset(names), block) for names, _ in kind.order for block in blocks} <= seen


def prefix_of(model, kind, names, rows, clean=None):
    """Of some of what rows are given, and of codes (B, n) that a text has."""
    prefix = model.encode_prefix(*kind.part(tuple(names), rows)) if names else None
    return prefix if clean is None else model.extend_prefix(prefix, {"out": clean})


# ---------------------------------------------------------------------------------------------------------------------
# Distributions


class PlainScheduler(MaskedDiffusionScheduler):
    """The reverse process as it is written: every step asks the model, and reveals each code by chance."""

    def next_event(self, timestep, masked, previous=None, *, generator=None):
        rows, time = torch.arange(len(masked)), float(timestep)
        left = torch.full_like(rows, round(time * STEPS) - 1)
        return MaskedDiffusionEvent(torch.full((len(masked),), time), True, None, left, masked.sum(1), rows)


def exact_distribution(
    probabilities: Callable[[torch.LongTensor, float], torch.Tensor], size: int, length: int, ratios: list[float]
) -> dict[tuple[int, ...], float]:
    """Of codes (length,) after the plain ancestral steps, by summing over all paths; `probabilities` are those (S,
    length, size) that the model gives for states (S, length) at a time."""
    states = list(itertools.product(range(size + 1), repeat=length))
    steps, now = len(ratios) - 1, {states[-1]: 1.0}
    for left in range(steps, 0, -1):
        p = dict(zip(states, probabilities(torch.tensor(states), left / steps).tolist(), strict=True))
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


@torch.no_grad()
def expected_distribution(
    pipe: VQDiTPipeline, kind: Kind, row: int, steps: list[tuple[tuple[str, ...], float]]
) -> dict[tuple[int, ...], float]:
    """Of a row's codes with guidance by these steps, block after block; no part of the pipeline's call is used."""
    size, times = kind.out["vocab_size"], torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    ratios = pipe.scheduler.mask_ratio(times).tolist()
    length = kind.out.get("block_length", math.prod(kind.shape))
    shape = (length,) if "block_length" in kind.out else kind.shape

    def of_block(before: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        def probabilities(states: torch.LongTensor, time: float) -> torch.Tensor:
            rows, less, joined = [row] * len(states), None, None
            clean = torch.tensor([before] * len(states)) if before else None
            for names, scale in ([((), 1.0)] if steps[0][1] != 1 else []) + steps:
                prefix = prefix_of(pipe.transformer, kind, names, rows, clean)
                codes, at = {"out": states.view(-1, *shape)}, torch.full((len(states),), time)
                logits = pipe.transformer(codes, at, prefix=prefix).sample["out"].double()
                joined = logits if less is None else joined + scale * (logits - less)
                less = logits
            return joined.softmax(-1)

        return exact_distribution(probabilities, size, length, ratios)

    whole = {(): 1.0}
    while len(next(iter(whole))) < math.prod(kind.shape):
        whole = {a + b: p * q for a, p in whole.items() for b, q in of_block(a).items()}
    return whole


def chi_square(counts: dict, expected: dict, draws: int) -> tuple[float, int]:
    """The statistic and its degrees of freedom; outcomes that are expected less than five times are one."""
    pairs = [(counts.get(x, 0), p) for x, p in expected.items() if draws * p >= 5]
    if len(pairs) < len(expected):
        pairs.append((draws - sum(count for count, _ in pairs), 1 - sum(p for _, p in pairs)))
    return sum((count - draws * p) ** 2 / (draws * p) for count, p in pairs), len(pairs) - 1


@every_kind
@pytest.mark.parametrize("scheduler", [MaskedDiffusionScheduler, PlainScheduler], ids=["by events", "plain"])
def test_samples_have_the_exact_distribution(kind, scheduler):
    """Within 4 standard deviations of the chi-squared statistic, and not that of another guidance."""
    pipe, row, draws = make(kind, scheduler(sampler="ancestral")), 1, 4000
    expected = expected_distribution(pipe, kind, row, kind.order)
    assert sum(expected.values()) == pytest.approx(1)
    sample = draw(pipe, kind, [row], count=draws, generator=torch.Generator().manual_seed(0))
    found, counts = sample.flatten(1).unique(dim=0, return_counts=True)
    counts = {tuple(one): count for one, count in zip(found.tolist(), counts.tolist(), strict=True)}
    statistic, freedom = chi_square(counts, expected, draws)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    everything = [(tuple(kind.given), 1.0)]
    others = [everything] if not isinstance(kind.scales, dict) else [everything, [(tuple(kind.given), 3.0)]]
    for steps in others:
        statistic, freedom = chi_square(counts, expected_distribution(pipe, kind, row, steps), draws)
        assert statistic > 2 * (freedom + 4 * math.sqrt(2 * freedom))
