import math

import pytest
import torch
import torch.multiprocessing as mp

from diffusers_vqdit.models.quantizers.codebook import IndexBackpropagationQuantizer, SimVectorQuantizer
from diffusers_vqdit.models.quantizers.lookup_free import FiniteScalarQuantizer, LookupFreeQuantizer
from diffusers_vqdit.models.quantizers.residual import ResidualVectorQuantizer
from diffusers_vqdit.models.quantizers.vector import VectorQuantizer, assignment_entropy, rotate_to
from diffusers_vqdit.training.metrics import expected_usage


def test_loss_and_gradients_equal_autograd_on_the_formula():
    quantizer = VectorQuantizer(16, 4, beta=0.3)
    quantizer.embedding.weight.data.normal_()
    z = torch.randn(20, 4, requires_grad=True)
    output = quantizer(z)
    upstream = torch.randn(20, 4)
    (output.loss + (output.quantized * upstream).sum()).backward()

    other, weight = z.detach().requires_grad_(), quantizer.embedding.weight.detach().requires_grad_()
    chosen = weight[output.codes]
    loss = 0.3 * (other - chosen.detach()).square().mean() + (other.detach() - chosen).square().mean()
    (loss + (other * upstream).sum()).backward()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(z.grad, other.grad)
    torch.testing.assert_close(quantizer.embedding.weight.grad, weight.grad)


def test_beta_multiplies_the_commitment_term_only():
    losses = []
    for beta in (0.0, 1.0, 2.0):
        torch.manual_seed(0)
        losses.append(VectorQuantizer(16, 4, beta=beta).eval()(torch.ones(3, 4)).loss)
    torch.testing.assert_close(losses[2] - losses[1], losses[1] - losses[0])
    torch.testing.assert_close(losses[1], 2 * losses[0])  # the two terms have the same value


def test_l2_codes_have_unit_length_and_ignore_scale():
    quantizer = VectorQuantizer(32, 5, codebook_norm="l2").eval()
    z = torch.randn(50, 5)
    assert torch.equal(quantizer.encode(z), quantizer.encode(7 * z))
    torch.testing.assert_close(quantizer(z).quantized.norm(dim=1), torch.ones(50))


def test_ema_update_is_the_closed_form():
    quantizer = VectorQuantizer(3, 2, codebook_update="ema", ema_decay=0.9).train()
    size, mean = quantizer.cluster_size.clone(), quantizer.cluster_mean.clone()
    z = torch.randn(30, 2)
    output = quantizer(z)
    one_hot = torch.nn.functional.one_hot(output.codes, 3).float()
    size = 0.9 * size + 0.1 * one_hot.mean(0)
    mean = 0.9 * mean + 0.1 * one_hot.T @ z / 30
    torch.testing.assert_close(quantizer.cluster_size, size)
    torch.testing.assert_close(quantizer.embedding.weight, mean / size[:, None])
    torch.testing.assert_close(output.loss, 0.25 * (z - output.quantized).square().mean())  # no codebook term
    assert not quantizer.embedding.weight.requires_grad


def test_evaluation_changes_nothing():
    quantizer = VectorQuantizer(8, 2, codebook_update="ema", codebook_init="kmeans", restart_threshold=0.5).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(50, 2))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_kmeans_initialisation_finds_separate_clusters():
    centres = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, 0.0], [0.0, -10.0]])
    z = centres.repeat(50, 1) + 0.01 * torch.randn(200, 2)
    quantizer = VectorQuantizer(40, 2, codebook_init="kmeans").train()
    assert quantizer(z).loss < 1e-4
    distance = torch.cdist(centres, quantizer.embedding.weight).min(1).values
    assert distance.max() < 0.05


def test_dead_codes_restart_where_the_error_is():
    quantizer = VectorQuantizer(64, 2, codebook_update="ema", ema_decay=0.5, restart_threshold=0.1).train()
    z = torch.cat([torch.zeros(900, 2), 5 + torch.randn(100, 2)])  # nine tenths are one vector, as a background is
    for _ in range(30):
        output = quantizer(z)
    assert output.usage > 0.5
    frozen = VectorQuantizer(64, 2, codebook_update="ema", ema_decay=0.5).train()
    for _ in range(30):
        reference = frozen(z)
    assert reference.usage < 0.1 < output.usage


MOVES = {
    "a jump": lambda z, step: z + (5.0 if step >= 20 else 0.0),
    "a drift": lambda z, step: z + 0.2 * step,
    "growth from one direction": lambda z, step: 1.0 + min(1.0, (5 + step) / 40) * z,
    "a mirror": lambda z, step: z if step % 20 < 10 else -z - 3,
}


@pytest.mark.parametrize("norm", ["none", "l2"])
@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("move", MOVES)
def test_codes_stay_in_use_at_every_step_while_the_vectors_move(move, update, norm):
    """As an encoder's do at the start of training; without restarts a few codes would have them all."""
    torch.manual_seed(0)
    options = {"codebook_norm": norm, "codebook_update": update, "codebook_init": "kmeans"}
    usages = {}
    for threshold in (0.0, 0.1):
        quantizer = VectorQuantizer(64, 8, restart_threshold=threshold, follow=True, **options).train()
        usages[threshold] = [quantizer(MOVES[move](torch.randn(200, 8), step)).usage.item() for step in range(40)]
    shown = expected_usage(64, 200)
    assert min(usages[0.1]) > 0.5 * shown
    assert move == "growth from one direction" or min(usages[0.0]) < 0.5 * shown


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_codes_of_uneven_use_are_let_be(update, monkeypatch):
    """Texts have some words often and most rarely: that a batch uses few codes is no sign that they are outrun."""
    torch.manual_seed(0)
    words, often = torch.randn(100, 8), 1.0 / torch.arange(1, 101)
    quantizer = VectorQuantizer(
        128, 8, codebook_update=update, codebook_init="data", restart_threshold=0.01, ema_decay=0.9, follow=True
    ).train()
    outrun = []
    restart = VectorQuantizer._is_outrun

    def counting(self, share, errors):
        outrun.append(restart(self, share, errors))
        return outrun[-1]

    monkeypatch.setattr(VectorQuantizer, "_is_outrun", counting)
    for _ in range(60):
        quantizer(words[torch.multinomial(often, 200, replacement=True)] + 0.01 * torch.randn(200, 8))
    assert not any(outrun[20:])


def test_averages_are_of_few_batches_at_first_and_of_many_later():
    options = {"codebook_update": "ema", "codebook_init": "data", "ema_decay": 0.9}
    quantizer = VectorQuantizer(4, 2, follow=True, **options).train()
    for step in range(200):
        before = quantizer.cluster_size.clone()
        share = torch.bincount(quantizer(torch.randn(50, 2)).codes, minlength=4) / 50
        decay = min(0.9, (1 + step) / (10 + step))
        if step:  # the first batch places the codes
            torch.testing.assert_close(quantizer.cluster_size, decay * before + (1 - decay) * share)


PLACED = [
    {"codebook_update": "ema", "codebook_init": "kmeans", "restart_threshold": 0.1, "follow": True},
    {"codebook_update": "ema", "codebook_init": "kmeans", "codebook_norm": "l2"},
    {"codebook_update": "ema", "codebook_init": "data"},
    {"codebook_init": "data", "restart_threshold": 0.9},
    {"codebook_update": "ema", "restart_threshold": 0.9},
]


@pytest.mark.parametrize("options", PLACED, ids=str)
def test_no_two_codes_are_put_where_rounding_would_tell_them_apart(options):
    """White patches give the same vector many times, or nearly: the sums of a network depend on the batch's layout."""
    vectors = 3.0 + torch.randn(40, 4)
    patches = torch.cat([vectors, vectors[:3].repeat(40, 1)])
    books = []
    for _ in range(2):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(64, 4, **options).train()
        torch.seed()
        for _ in range(3):
            quantizer(patches + 1e-7 * torch.randn_like(patches))
        books.append(quantizer.codebook.detach())
        distances = torch.cdist(vectors, books[-1]) if "codebook_norm" not in options else None
        if distances is not None and options.get("codebook_init") != "kmeans":
            assert (distances < 1e-2).sum(1).max() <= 1  # a code a patch, not two
    torch.testing.assert_close(*books, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [*PLACED, {"codebook_update": "ema"}], ids=str)
def test_a_batch_that_is_not_finite_changes_nothing(options, value):
    z = torch.randn(200, 4)
    broken = z.clone()
    broken[17, 2] = value
    quantizer = VectorQuantizer(64, 4, **options).train()
    first = {name: state.clone() for name, state in quantizer.state_dict().items()}
    for before in (first, None):  # as the first batch too
        before = before or {name: state.clone() for name, state in quantizer.state_dict().items()}
        quantizer(broken)
        for name, state in quantizer.state_dict().items():
            assert torch.equal(state, before[name]), name
        quantizer(z)
    assert all(state.isfinite().all() for state in quantizer.state_dict().values())
    if quantizer.codebook_init != "uniform":
        assert quantizer(z).usage > 0.4  # initialised by the first batch that was finite


def test_usage_and_perplexity():
    quantizer = VectorQuantizer(4, 1).eval()
    quantizer.embedding.weight.data = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    output = quantizer(torch.tensor([[0.0], [0.1], [1.0], [1.1]]))
    assert output.usage.item() == 0.5
    assert math.isclose(output.perplexity.item(), 2.0, rel_tol=1e-5)


DISTRIBUTED = {
    "ema": lambda: VectorQuantizer(16, 3, codebook_update="ema", codebook_init="kmeans", restart_threshold=0.5),
    "restart": lambda: VectorQuantizer(16, 3, restart_threshold=0.9, gradient_estimator="rotation"),
    "vq, entropy": lambda: VectorQuantizer(16, 3, codebook_norm="l2", entropy_weight=0.1, entropy_temperature=0.5),
    "simvq": lambda: SimVectorQuantizer(16, 3),
    "rvq": lambda: ResidualVectorQuantizer(
        VectorQuantizer(16, 3, codebook_update="ema", codebook_init="kmeans", restart_threshold=0.5) for _ in range(3)
    ),
    "ibq": lambda: IndexBackpropagationQuantizer(16, 3, entropy_weight=0.1, entropy_temperature=0.5),
    "lfq": lambda: LookupFreeQuantizer(3, entropy_weight=0.1, entropy_temperature=2.0),
}


def _train(make, z, world_size=1, rank=0):
    """State, gradient of the vectors, usage and perplexity after five steps of gradient descent."""
    torch.manual_seed(0)
    quantizer = make().train()
    z = z.chunk(world_size)[rank].clone().requires_grad_()
    for _ in range(5):
        quantizer.zero_grad()
        z.grad = None
        output = quantizer(z)
        (output.loss + output.quantized.square().mean()).backward()
        for parameter in quantizer.parameters():
            if parameter.grad is not None:
                if world_size > 1:  # as DistributedDataParallel does
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= world_size
                parameter.data -= 0.1 * parameter.grad
    return {
        **{name: value.clone() for name, value in quantizer.state_dict().items()},
        "vectors' gradient": z.grad / world_size,
        "usage": output.usage,
        "perplexity": output.perplexity.detach(),
    }


def _train_rank(rank, world_size, z, path, queue):
    torch.set_num_threads(1)  # a forked process must not wait for its parent's threads
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=world_size)
    states = {name: _train(make, z, world_size, rank) for name, make in DISTRIBUTED.items()}
    # What is not finite on one process is ignored by all.
    quantizer = DISTRIBUTED["ema"]().train()
    for broken in (rank, -1, rank):
        before = {name: state.clone() for name, state in quantizer.state_dict().items()}
        quantizer(z.chunk(world_size)[rank] if broken != 1 else torch.full((32, 3), math.nan))
        unchanged = all(torch.equal(state, before[name]) for name, state in quantizer.state_dict().items())
        assert unchanged == (broken != -1)
    queue.put((rank, {name: {k: v.numpy() for k, v in state.items()} for name, state in states.items()}))
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_same_quantizers_as_one(tmp_path):
    z = torch.randn(64, 3)
    context = mp.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_train_rank, args=(r, 2, z, tmp_path / "store", queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    states = dict(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    for name, make in DISTRIBUTED.items():
        for key, value in _train(make, z).items():
            parts = [torch.from_numpy(states[rank][name][key]) for rank in range(2)]
            if key == "vectors' gradient":
                parts = [torch.cat(parts)]
            for part in parts:
                torch.testing.assert_close(part, value, atol=1e-5, rtol=1e-4, msg=f"{name}: {key}")


@pytest.mark.parametrize("options", [{"codebook_update": "ema"}, {"restart_threshold": 0.1}])
def test_moving_averages_of_half_precision_are_refused_in_training_only(options):
    quantizer = VectorQuantizer(16, 4, **options).bfloat16()
    z = torch.randn(8, 4).bfloat16()
    with pytest.raises(ValueError, match="torch.bfloat16, training needs torch.float32"):
        quantizer.train()(z)
    assert quantizer.eval()(z).quantized.dtype == torch.bfloat16
    quantizer.float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(quantizer(z).loss)


@pytest.mark.parametrize("codes", [torch.tensor([16]), torch.tensor([-1])])
def test_codes_out_of_range_are_named(codes):
    with pytest.raises(ValueError, match=r"must be in \[0, 16\)"):
        VectorQuantizer(16, 4).lookup(codes)


@pytest.mark.parametrize("option", ["codebook_norm", "codebook_update", "codebook_init"])
def test_unknown_options_are_named(option):
    with pytest.raises(ValueError, match=f"{option}='other'"):
        VectorQuantizer(16, 4, **{option: "other"})


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of the others, against autograd on the formulas


def _backward(quantizer, z, upstream):
    """Gradients of loss + <quantized, upstream> with respect to z and the parameters."""
    z = z.clone().requires_grad_()
    output = quantizer(z)
    (output.loss + (output.quantized * upstream).sum()).backward()
    return output, z.grad, {name: p.grad for name, p in quantizer.named_parameters() if p.requires_grad}


def _rotation(u, v):
    """The rotation in the plane of the unit vectors u and v that takes u to v, by Rodrigues' formula."""
    cosine = u @ v
    w = v - cosine * u
    w = w / w.norm()
    sine = (1 - cosine**2).sqrt()
    plane = torch.outer(w, u) - torch.outer(u, w)
    return torch.eye(len(u), dtype=u.dtype) + sine * plane + (1 - cosine) * plane @ plane


def test_rotation_trick_is_the_scaled_rotation():
    z, q, upstream = torch.randn(3, 20, 5, dtype=torch.float64).unbind()
    z = z.requires_grad_()
    rotated = rotate_to(z, q)
    (rotated * upstream).sum().backward()
    assert torch.equal(rotated, q)
    for i in range(20):
        a = z[i].detach()
        matrix = q[i].norm() / a.norm() * _rotation(a / a.norm(), q[i] / q[i].norm())
        torch.testing.assert_close(matrix @ a, q[i])
        torch.testing.assert_close(z.grad[i], matrix.T @ upstream[i])


def test_rotation_trick_of_opposite_and_zero_vectors_is_finite():
    z = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    q = torch.tensor([[-2.0, 0.0], [1.0, 1.0]])
    rotated = rotate_to(z, q)
    rotated.sum().backward()
    assert torch.equal(rotated, q) and torch.isfinite(z.grad).all()


def test_rotation_is_an_option_of_the_codebook():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, beta=0.0, gradient_estimator="rotation")
    quantizer.embedding.weight.data.normal_()
    z, upstream = torch.randn(20, 4), torch.randn(20, 4)
    output, gradient, _ = _backward(quantizer, z, upstream)
    other = z.clone().requires_grad_()
    (rotate_to(other, quantizer.codebook[output.codes]) * upstream).sum().backward()
    torch.testing.assert_close(gradient, other.grad)


def test_simvq_trains_the_projection_only():
    quantizer = SimVectorQuantizer(16, 4, beta=0.3)
    z, upstream = torch.randn(20, 4), torch.randn(20, 4)
    output, gradient, gradients = _backward(quantizer, z, upstream)

    frozen, weight = quantizer.embedding.weight, quantizer.projection.weight.detach().requires_grad_()
    codebook = frozen @ weight.T
    other = z.clone().requires_grad_()
    codes = torch.cdist(other, codebook).argmin(1)
    chosen = codebook[codes]
    loss = 0.3 * (other - chosen.detach()).square().mean() + (other.detach() - chosen).square().mean()
    (loss + (other * upstream).sum()).backward()
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradient, other.grad)
    assert gradients.keys() == {"projection.weight"}
    torch.testing.assert_close(gradients["projection.weight"], weight.grad)


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_ibq_has_a_gradient_through_all_codes(norm, monkeypatch):
    for module in ("vector", "codebook"):
        monkeypatch.setattr(f"diffusers_vqdit.models.quantizers.{module}.SEARCH_ELEMENTS", 7 * 16)  # several parts
    quantizer = IndexBackpropagationQuantizer(16, 4, beta=0.3, codebook_norm=norm)
    z, upstream = torch.randn(20, 4), torch.randn(20, 4)
    output, gradient, gradients = _backward(quantizer, z, upstream)

    other, weight = z.clone().requires_grad_(), quantizer.embedding.weight.detach().requires_grad_()
    unit, codebook = other, weight
    if norm == "l2":
        unit, codebook = torch.nn.functional.normalize(other), torch.nn.functional.normalize(weight)
    p = torch.softmax(unit @ codebook.T, dim=1)
    codes = p.argmax(1)
    hard = torch.nn.functional.one_hot(codes, 16).float()
    quantized = (hard + p - p.detach()) @ codebook
    chosen = hard @ codebook
    loss = (quantized - unit).square().mean() + (chosen - unit.detach()).square().mean()
    loss = loss + 0.3 * (unit - chosen.detach()).square().mean()
    (loss + (quantized * upstream).sum()).backward()
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.quantized, chosen)
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradient, other.grad)
    torch.testing.assert_close(gradients["embedding.weight"], weight.grad)
    assert (weight.grad.abs().sum(1) > 0).all()


def test_fsq_has_the_gradient_of_its_bound():
    quantizer = FiniteScalarQuantizer((8, 5, 4))
    z, upstream = 2 * torch.randn(50, 3), torch.randn(50, 3)
    output, gradient, _ = _backward(quantizer, z, upstream)
    other = z.clone().requires_grad_()
    levels = torch.tensor([8, 5, 4])
    half = (levels - 1) * 1.001 / 2
    offset = torch.tensor([0.5, 0.0, 0.5])
    bounded = half * torch.tanh(other + torch.atanh(offset / half)) - offset
    ((bounded / (levels // 2)) * upstream).sum().backward()
    torch.testing.assert_close(output.quantized, bounded.detach().round() / (levels // 2))
    torch.testing.assert_close(gradient, other.grad)
    assert output.loss == 0


def test_fsq_reaches_every_level_and_keeps_zero():
    quantizer = FiniteScalarQuantizer((8, 5, 3, 4))
    z = torch.linspace(-20, 20, 2001)[:, None].expand(-1, 4)
    quantized = quantizer(z).quantized
    assert [len(quantized[:, d].unique()) for d in range(4)] == [8, 5, 3, 4]
    assert quantized.min() == -1 and quantized.max() == 1
    assert (quantizer(torch.zeros(1, 4)).quantized == 0).all()


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_lfq_is_the_sign(norm):
    quantizer = LookupFreeQuantizer(5, beta=0.3, codebook_norm=norm)
    z, upstream = torch.randn(20, 5), torch.randn(20, 5)
    output, gradient, _ = _backward(quantizer, z, upstream)
    other = z.clone().requires_grad_()
    unit = torch.nn.functional.normalize(other) if norm == "l2" else other
    sign = unit.detach().sign() * (5**-0.5 if norm == "l2" else 1.0)
    loss = 0.3 * (unit - sign).square().mean()
    (loss + (unit * upstream).sum()).backward()
    torch.testing.assert_close(output.quantized, sign)
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradient, other.grad)


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_lfq_entropies_are_those_of_all_codes(norm, monkeypatch):
    """Exact while one group holds all bits, an upper bound of H(E[p]) beyond; in any number of parts."""
    weight, temperature = 2.0, 0.7
    quantizer = LookupFreeQuantizer(
        4, beta=0.0, codebook_norm=norm, entropy_weight=weight, entropy_temperature=temperature
    )
    codebook = quantizer.lookup(torch.arange(16))
    z = torch.randn(30, 4, requires_grad=True)
    unit = torch.nn.functional.normalize(z) if norm == "l2" else z
    p = torch.softmax(-torch.cdist(unit, codebook).square() / temperature, dim=1)
    sample_entropy = -(p * p.log()).sum(1).mean()
    exact = weight * (sample_entropy + (p.mean(0) * p.mean(0).log()).sum())
    for elements in (2**22, 7 * 16):
        monkeypatch.setattr("diffusers_vqdit.models.quantizers.lookup_free.SEARCH_ELEMENTS", elements)
        loss = quantizer(z).loss
        torch.testing.assert_close(loss, exact, atol=1e-4, rtol=1e-4)
        found, expected = (torch.autograd.grad(one, z, retain_graph=True)[0] for one in (loss, exact))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)

    monkeypatch.setattr("diffusers_vqdit.models.quantizers.lookup_free.ENTROPY_GROUP", 3)
    bits = torch.arange(16)[:, None] >> torch.arange(4) & 1
    first = torch.stack([p.mean(0)[torch.arange(16) % 8 == value].sum() for value in range(8)])
    last = p.mean(0) @ bits[:, 3].float()
    bound = -(first * first.log()).sum() - (last * last.log() + (1 - last) * (1 - last).log())
    torch.testing.assert_close(quantizer(z).loss, weight * (sample_entropy - bound), atol=1e-4, rtol=1e-4)
    assert quantizer(z).loss < exact


def test_assignment_entropy_in_parts_equals_autograd_on_the_formula(monkeypatch):
    for module in ("vector", "codebook"):
        monkeypatch.setattr(f"diffusers_vqdit.models.quantizers.{module}.SEARCH_ELEMENTS", 7 * 16)
    z, codebook = torch.randn(20, 4, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    gradients = torch.autograd.grad(
        assignment_entropy(2 * z, codebook, -codebook.square().sum(1), 0.5), (z, codebook), retain_graph=True
    )
    p = torch.softmax(-torch.cdist(z, codebook).square() / 0.5, dim=1)
    mean = p.mean(0)
    expected = -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()
    torch.testing.assert_close(assignment_entropy(2 * z, codebook, -codebook.square().sum(1), 0.5), expected)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, (z, codebook)), strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What all have in common


ALL = {
    "vq": lambda beta=0.25: VectorQuantizer(32, 5, beta=beta),
    "vq, l2": lambda beta=0.25: VectorQuantizer(32, 5, beta=beta, codebook_norm="l2"),
    "simvq": lambda beta=0.25: SimVectorQuantizer(32, 5, beta=beta),
    "ibq": lambda beta=0.25: IndexBackpropagationQuantizer(32, 5, beta=beta),
    "lfq": lambda beta=0.25: LookupFreeQuantizer(5, beta=beta),
    "bsq": lambda beta=0.25: LookupFreeQuantizer(5, beta=beta, codebook_norm="l2"),
    "fsq": lambda beta=0.25: FiniteScalarQuantizer((8, 4)),
}


@pytest.mark.parametrize("name", ALL)
def test_codes_and_vectors_round_trip(name):
    quantizer = ALL[name]().eval()
    if hasattr(quantizer, "embedding"):
        quantizer.embedding.weight.data = torch.nn.functional.normalize(torch.randn(32, 5))
    codes = torch.arange(32).view(4, 8)
    vectors = quantizer.lookup(codes)
    assert vectors.shape == (4, 8, quantizer.code_dim)
    if name == "fsq":  # what its bound takes to the levels
        half = torch.tensor([7, 3]) * 1.001 / 2
        vectors = torch.atanh((vectors * torch.tensor([4, 2]) + 0.5) / half) - torch.atanh(0.5 / half)
    assert torch.equal(quantizer.encode(vectors), codes)
    z = torch.randn(6, 7, quantizer.code_dim)
    output = quantizer(z)
    assert torch.equal(output.codes, quantizer.encode(z))
    torch.testing.assert_close(output.quantized, quantizer.lookup(output.codes))
    counts = torch.bincount(output.codes.flatten(), minlength=32)
    assert output.usage == (counts > 0).float().mean()
    share = counts[counts > 0] / counts.sum()
    torch.testing.assert_close(output.perplexity, torch.exp(-(share * share.log()).sum()))


@pytest.mark.parametrize("name", [name for name in ALL if name != "fsq"])
def test_beta_multiplies_the_commitment_term_of_each(name):
    z = torch.randn(9, 5)
    losses = []
    for beta in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        quantizer = ALL[name](beta).eval()
        output = quantizer(z)
        losses.append(output.loss)
    inputs = torch.nn.functional.normalize(z) if name in ("vq, l2", "bsq") else z
    commitment = (inputs - output.quantized).square().mean()
    torch.testing.assert_close(losses[1] - losses[0], commitment)
    torch.testing.assert_close(losses[2] - losses[0], 3 * commitment)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_codes_of_its_vectors_in_float32(name, dtype):
    quantizer = ALL[name]().eval()
    z = torch.randn(50, quantizer.code_dim).to(dtype)
    expected = quantizer(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(z)
    assert output.quantized.dtype == dtype and output.loss.dtype == torch.float32
    assert torch.equal(output.codes, expected.codes) and torch.equal(quantizer.encode(z), expected.codes)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.quantized, expected.quantized.to(dtype))


def test_code_order_has_the_first_channel_fastest():
    quantizer = FiniteScalarQuantizer((4, 3))
    assert quantizer.lookup(torch.tensor([0, 1, 4])).tolist() == [[-1.0, -1.0], [-0.5, -1.0], [-1.0, 0.0]]
    assert LookupFreeQuantizer(3).lookup(torch.tensor([1, 4])).tolist() == [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]


@pytest.mark.parametrize("name", ALL)
def test_bad_vectors_and_codes_are_named_by_all(name):
    quantizer = ALL[name]()
    with pytest.raises(ValueError, match=f"must end in {quantizer.code_dim} channels"):
        quantizer(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"must be in \[0, 32\)"):
        quantizer.lookup(torch.tensor([32]))
    with pytest.raises(ValueError, match="float32"):
        quantizer.lookup(torch.zeros(3))


@pytest.mark.parametrize("levels", [(), (2, 3), (4.0,)])
def test_bad_levels_are_named(levels):
    with pytest.raises(ValueError, match="levels="):
        FiniteScalarQuantizer(levels)


@pytest.mark.parametrize("levels", [(1003, 3), (4096,), (2**16, 3)])
def test_fsq_of_many_levels_stays_within_them(levels):
    quantizer = FiniteScalarQuantizer(levels)
    far = torch.tensor([[9.0], [-9.0], [0.3]]).expand(3, len(levels)) * torch.tensor([1.0, -1.0][: len(levels)])
    codes = quantizer.encode(far)
    assert 0 <= codes.min() and codes.max() < math.prod(levels)
    assert len(set(codes[:2].tolist())) == 2
    torch.testing.assert_close(quantizer.lookup(codes), quantizer(far).quantized)
