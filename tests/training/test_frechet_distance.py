import pytest
import torch

from diffusers_vqdit.training.frechet_distance import FrechetDistance, frechet_distance


def test_frechet_distance_of_known_gaussians():
    mean, other = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 4.0]).double()
    a, b = torch.tensor([4.0, 9.0]).double().diag(), torch.tensor([1.0, 16.0]).double().diag()
    # Where covariances commute, tr(A + B - 2 (AB)^(1/2)) = sum (sqrt a - sqrt b)^2.
    assert frechet_distance(mean, a, other, b) == pytest.approx(1 + 4 + 1 + 1)
    rotation = torch.linalg.qr(torch.randn(2, 2).double()).Q
    turned = [rotation @ mean, rotation @ a @ rotation.T, rotation @ other, rotation @ b @ rotation.T]
    assert frechet_distance(*turned) == pytest.approx(7)
    assert frechet_distance(mean, a, mean, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_pictures_in_batches():
    metric = FrechetDistance(lambda pixels: pixels.mean((2, 3)))
    real, made = torch.rand(50, 3, 4, 4), 0.5 * torch.rand(60, 3, 4, 4)
    with pytest.raises(ValueError, match="no real pictures"):
        metric.compute()
    for part in real.split(7):
        metric.update(part, real=True)
    for part in made.split(11):
        metric.update(part, real=False)
    a, b = (pictures.mean((2, 3)).double() for pictures in (real, made))
    expected = frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert metric.compute() == pytest.approx(expected)
