"""What things cost, in quantities that are the same on any machine: operators, FLOPs, weights, memory, calls,
waits."""

import weakref
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import flops
from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.check_inputs import FiniteChecks


MIB = 2**20
DIM, LAYERS, IMAGE, TEXT, SIZE = 32, 2, 16, 12, 32  # of the tiny transformer
SAMPLERS = ["ancestral", "confidence", "halton", "entropy_bound", "threshold"]


class Operators(TorchDispatchMode):
    """Counts operators, and those that move values between devices."""

    def __init__(self):
        super().__init__()
        self.total, self.copies = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.total += 1
        if isinstance(result, torch.Tensor):
            devices = {value.device for value in (*args, result) if isinstance(value, torch.Tensor) and value.ndim}
            self.copies += len(devices) > 1
        return result


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and not yet let go."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {storage._cdata for storage in self._storages((args, kwargs))}  # views are of these
        for storage in self._storages(result):
            if storage._cdata not in before | self.live.keys():
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._let_go, storage._cdata)
        return result

    def _storages(self, values):
        return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]

    def _let_go(self, storage):
        self.now -= self.live.pop(storage)


def peak_bytes(function):
    with torch.no_grad(), PeakBytes() as counter:
        function()
    return counter.peak


def adaln_flops(segments):
    return 2 * segments * DIM * (6 * DIM * LAYERS + 2 * DIM)


def layer_flops(own, given):
    """Linear layers of `own` positions, which also see `given` ones."""
    return 2 * own * 12 * DIM**2 + 4 * own * (own + given) * DIM


@pytest.fixture
def inputs():
    return {"text": torch.randint(64, (1, TEXT))}, {"image": torch.full((1, 4, 4), SIZE)}


def test_a_forward_pass_has_the_flops_of_its_formula(transformer, inputs):
    given, codes = inputs
    head = 2 * IMAGE * DIM * SIZE
    free = flops(lambda: transformer(codes))
    assert free == LAYERS * layer_flops(IMAGE, 0) + adaln_flops(1) + head
    prefix, modulation = transformer.encode_prefix(given), transformer.encode_modulation(codes)
    own = flops(lambda: transformer(codes, prefix=prefix))
    assert own == LAYERS * layer_flops(IMAGE, TEXT) + adaln_flops(1) + head
    both = flops(lambda: transformer(codes, prefix=prefix, with_unconditional=True))
    assert both == own + free - adaln_flops(1)  # guidance costs less than twice
    assert flops(lambda: transformer(codes, prefix=prefix, modulation=modulation)) == own - adaln_flops(1)
    # The last layer of what is given makes keys and values only.
    last = 2 * TEXT * 2 * DIM**2 + 2 * DIM * 6 * DIM
    assert flops(lambda: transformer.encode_prefix(given)) == layer_flops(TEXT, 0) + 2 * DIM * 6 * DIM + last
    assert flops(lambda: transformer(codes, given=given)) == own + flops(lambda: transformer.encode_prefix(given))


def test_a_prefix_of_half_the_positions_more_than_halves_a_call(transformer):
    """As many codes given as generated: beside one sequence of both, as a model without a prefix has."""
    given = {"image": torch.randint(SIZE, (1, 4, 4))}
    prefix = transformer.encode_prefix(given)
    call = flops(lambda: transformer({"text": torch.full((1, 16), 64)}, prefix=prefix))
    head = 2 * 16 * DIM * 64
    assert 2 * (call - head - adaln_flops(1)) == LAYERS * layer_flops(32, 0)


@pytest.mark.parametrize("count", [0, 1, 5, IMAGE])
def test_the_head_costs_what_is_masked(transformer, inputs, count):
    _, codes = inputs
    masked = {"image": torch.arange(IMAGE)[None] < count}
    saved = flops(lambda: transformer(codes)) - flops(lambda: transformer(codes, masked=masked))
    assert saved == 2 * (IMAGE - count) * DIM * SIZE


def test_patches_quarter_the_positions():
    counted = []
    for size in (1, 2):
        segment = {"vocab_size": SIZE, "shape": [8, 8], "patch": [size, size]}
        model = VQDiTTransformer2DModel(1, DIM, num_layers=LAYERS, segments={"image": segment})
        codes = {"image": torch.full((1, 8, 8), SIZE)}
        masked = {"image": torch.zeros(1, 64, dtype=torch.bool)}  # without heads
        counted.append(flops(lambda m=model, c=codes, w=masked: m(c, masked=w)) - adaln_flops(1))
    whole, quarter = counted
    assert whole == LAYERS * layer_flops(64, 0)
    joining = 2 * 16 * DIM * 4 * 64 * 2  # codes of 64 channels to a position, and back
    assert quarter == LAYERS * layer_flops(16, 0) + joining


def test_operators_of_a_forward_pass(transformer, inputs):
    given, codes = inputs
    shallow = VQDiTTransformer2DModel.from_config(transformer.config, num_layers=1).eval()
    totals = []
    for model in (shallow, transformer):
        prefix, modulation = model.encode_prefix(given), model.encode_modulation(codes)
        with torch.no_grad(), Operators() as operators:
            model(codes, prefix=prefix, modulation=modulation, check_values=False)
        totals.append(operators.total)
    block = totals[1] - totals[0]
    assert block <= 62 and totals[0] - block <= 15  # as many with PyTorch 2.13


def test_weights_of_a_model_by_its_formula(transformer):
    """12 D^2 a block and 6 D^2 for its adaLN, embeddings and heads besides."""
    block = 4 * DIM**2 + 8 * DIM**2 + 6 * DIM**2 + 2 * 16  # norms of queries and keys
    biases = 4 * DIM + DIM * (4 + 1) + 6 * DIM  # attention; feed-forward; adaLN
    codes = sum(DIM * (size + 1) + (DIM + 1) * size for size in (64, SIZE, 3))
    expected = LAYERS * (block + biases) + codes + 6 * DIM + 2 * DIM**2 + 2 * DIM
    assert sum(parameter.numel() for parameter in transformer.parameters()) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_peak_bytes_are_those_of_what_is_alive():
    def work():
        kept = torch.ones(1000)
        for _ in range(5):
            kept + 1
        del kept
        torch.ones(500).view(10, 50)

    assert peak_bytes(work) == 2 * 4000


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_of_many_logits_makes_few_of_them_again(sampler):
    logits, sample = torch.randn(4, 256, 8192), torch.full((4, 256), 8192)  # 32 MiB
    scheduler = MaskedDiffusionScheduler(sampler=sampler)
    scheduler.set_timesteps(12)
    assert peak_bytes(lambda: scheduler.step(logits, scheduler.timesteps[5], sample)) < 4.5 * MIB


@pytest.mark.parametrize("side", [8, 16])
def test_a_forward_pass_keeps_no_layer_but_one(side):
    """As much with eight layers as with two, and a fixed number of channels a position at any size."""
    peaks = []
    for layers in (2, 8):
        segments = {"image": {"vocab_size": 64, "shape": [side, side]}}
        model = VQDiTTransformer2DModel(2, 16, num_layers=layers, segments=segments).eval()
        codes = {"image": torch.full((2, side, side), 64)}
        options = {"modulation": model.encode_modulation(codes), "check_values": False}
        model(codes, **options)  # once: positions are kept
        peaks.append(peak_bytes(lambda m=model, c=codes, o=options: m(c, **o)))
    activations = 4 * 2 * side**2 * DIM  # of one layer, (B, N, D) in float32
    assert abs(peaks[0] - peaks[1]) <= activations and max(peaks) < 20 * activations


# ---------------------------------------------------------------------------------------------------------------------
# Calls of the model in a run


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 6, 100])
def test_calls_of_a_run(pipeline, monkeypatch, sampler, steps):
    rows, forward = [], pipeline.transformer.forward

    def counted(codes, **options):
        rows.append(len(codes["image"]))
        assert options["with_unconditional"]
        return forward(codes, **options)

    monkeypatch.setattr(pipeline.transformer, "forward", counted)
    pipeline.scheduler = MaskedDiffusionScheduler(sampler=sampler)
    pipeline(["a red apple", "a blue box"], num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    assert rows[0] == 2 and rows == sorted(rows, reverse=True)
    if sampler in ("confidence", "halton"):
        assert rows == [2] * min(steps, IMAGE) if steps != 100 else len(rows) <= IMAGE
    assert len(rows) <= min(steps, IMAGE)


# ---------------------------------------------------------------------------------------------------------------------
# Waits for the device: tensors without values, which say so where a value, or a number of them, is asked for


def encode_unseen(transformer, given):
    """A prefix of codes that are not looked at, as while a graph is traced."""
    with patch.object(torch.compiler, "is_compiling", lambda: True):
        return transformer.encode_prefix(given)


def test_a_forward_pass_waits_for_no_device_and_copies_nothing_to_it(transformer, inputs):
    given, codes = ({name: value.to("meta") for name, value in side.items()} for side in inputs)
    transformer.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        transformer.encode_prefix(given)  # looks at what enters
    prefix, modulation = encode_unseen(transformer, given), transformer.encode_modulation(codes)
    options = {"prefix": prefix, "modulation": modulation, "with_unconditional": True, "check_values": False}
    transformer(codes, **options)  # once: positions are moved to the device and kept
    with torch.no_grad(), Operators() as operators:
        logits = transformer(codes, **options).sample["image"]
    assert logits.shape == (2, IMAGE, SIZE) and operators.total > 50 and operators.copies == 0


@pytest.mark.parametrize(
    "options", [*({"sampler": name} for name in SAMPLERS), {"sampler": "ancestral", "remask": 0.1}]
)
@pytest.mark.parametrize("masked", [[IMAGE, IMAGE], [IMAGE, 0]])
def test_a_step_of_a_run_waits_for_the_device_once(pipeline, inputs, monkeypatch, options, masked):
    waits = {"event": 0, "end": 0}

    def cpu(self):
        waits["event"] += 1
        return torch.tensor(masked)

    def read(self):
        waits["end"] += 1

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(FiniteChecks, "read", read)
    pipeline.transformer.to("meta")
    prefix = encode_unseen(pipeline.transformer, {"text": inputs[0]["text"].to("meta").expand(2, -1)})
    codes = {"image": torch.full((2, 4, 4), SIZE, device="meta")}
    scheduler = MaskedDiffusionScheduler(guidance_schedule="linear", **options)
    scheduler.set_timesteps(5)
    arguments = {"temperature": None, "generator": None, "callback": None, "tensor_inputs": []}
    with torch.no_grad():
        drawn, _ = pipeline._denoise(codes, prefix, scheduler, guidance_scale=3.0, **arguments)
    assert drawn["image"].shape == (2, 4, 4) and waits == {"event": 5, "end": 1}
