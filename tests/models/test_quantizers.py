import math

import pytest
import torch
import torch.multiprocessing as mp

from diffusers_vqdit.models.quantizers import VectorQuantizer, nearest_codes


def test_search_equals_brute_force():
    z, codebook = torch.randn(500, 6), torch.randn(70, 6)
    assert torch.equal(nearest_codes(z, codebook), torch.cdist(z.double(), codebook.double()).argmin(1))


def test_search_in_parts_equals_search_at_once(monkeypatch):
    z, codebook = torch.randn(100, 6), torch.randn(70, 6)
    expected = nearest_codes(z, codebook)
    monkeypatch.setattr("diffusers_vqdit.models.quantizers.SEARCH_ELEMENTS", 7 * 70)
    assert torch.equal(nearest_codes(z, codebook), expected)


def test_ties_go_to_the_lowest_index():
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert nearest_codes(torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]), codebook).tolist() == [0, 1, 0]


def test_search_of_bfloat16_runs_in_float32():
    z, codebook = torch.randn(300, 8).bfloat16(), torch.randn(256, 8)
    expected = torch.cdist(z.double(), codebook.double()).argmin(1)
    assert torch.equal(nearest_codes(z, codebook), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_codes(z.float(), codebook), expected)


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


def test_usage_and_perplexity():
    quantizer = VectorQuantizer(4, 1).eval()
    quantizer.embedding.weight.data = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    output = quantizer(torch.tensor([[0.0], [0.1], [1.0], [1.1]]))
    assert output.usage.item() == 0.5
    assert math.isclose(output.perplexity.item(), 2.0, rel_tol=1e-5)


def _train_rank(rank, world_size, z, path, queue):
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=world_size)
    quantizer = _quantizer()
    for _ in range(5):
        quantizer(z.chunk(world_size)[rank])
    queue.put((rank, {name: value.numpy() for name, value in quantizer.state_dict().items()}))
    torch.distributed.destroy_process_group()


def _quantizer():
    torch.manual_seed(0)
    return VectorQuantizer(16, 3, codebook_update="ema", codebook_init="kmeans", restart_threshold=0.5).train()


def test_two_processes_train_the_same_codebook_as_one(tmp_path):
    z = torch.randn(64, 3)
    context = mp.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_train_rank, args=(r, 2, z, tmp_path / "store", queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    states = dict(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    alone = _quantizer()
    for _ in range(5):
        alone(z)
    for name, value in alone.state_dict().items():
        for rank in range(2):
            torch.testing.assert_close(torch.from_numpy(states[rank][name]), value, msg=f"{name} on rank {rank}")


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
