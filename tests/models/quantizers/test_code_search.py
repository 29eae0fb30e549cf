import pytest
import torch

from diffusers_vqdit.models.quantizers.code_search import best_codes, first_largest, nearest_codes, search_rows


def test_search_equals_brute_force():
    z, codebook = torch.randn(500, 6), torch.randn(70, 6)
    assert torch.equal(nearest_codes(z, codebook), torch.cdist(z.double(), codebook.double()).argmin(1))


def test_search_in_parts_equals_search_at_once(monkeypatch):
    z, codebook = torch.randn(100, 6), torch.randn(70, 6)
    expected = nearest_codes(z, codebook)
    monkeypatch.setattr("diffusers_vqdit.models.quantizers.code_search.SEARCH_ELEMENTS", 7 * 70)
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


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 1000, 4096])
@pytest.mark.parametrize("values", [1, 2, 50])
def test_the_first_largest_is_the_first_of_equal_ones(size, values):
    scores = torch.randint(values, (40, size)).float() - values
    first = torch.where(scores == scores.amax(1, keepdim=True), torch.arange(size), size).amin(1)
    assert torch.equal(first_largest(scores), first)
    scores[::3] = -torch.inf
    scores[1::3, size // 2] = torch.nan
    assert torch.equal(first_largest(scores), scores.argmax(1))


@pytest.mark.parametrize(("size", "dim"), [(1, 3), (1000, 8), (1024, 32), (5000, 64)])
def test_the_best_codes_are_those_of_all_scores(size, dim):
    z, codebook, offset = torch.randn(700, dim), torch.randn(size, dim), torch.randn(size)
    assert torch.equal(best_codes(z, codebook, offset), torch.addmm(offset, z, codebook.T).argmax(1))
    twice = torch.cat([codebook, codebook])
    assert torch.equal(best_codes(z, twice), best_codes(z, codebook))


def test_scores_held_at_once_are_bounded():
    for dim in (4, 32, 33, 256):
        for size in (1, 1000, 2**14, 2**18):
            held = search_rows(torch.empty(1, dim), size) * size
            assert held <= 2**22
            assert dim > 32 or held <= max(2**18, 16 * size)


def test_the_search_is_in_float32_where_tf32_is_allowed(monkeypatch):
    allowed, addmm = [], torch.addmm

    def spy(*args, **options):
        allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return addmm(*args, **options)

    monkeypatch.setattr(torch, "addmm", spy)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for outside in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = outside
            nearest_codes(torch.randn(5, 3), torch.randn(7, 3))
            assert torch.backends.cuda.matmul.allow_tf32 is outside
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert allowed == [False, False]
