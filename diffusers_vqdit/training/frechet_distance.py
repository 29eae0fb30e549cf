"""The Frechet distance of pictures, with any feature extractor."""

from collections.abc import Callable

import torch

from ..utils.distributed import sum_over_processes


class FrechetDistance:
    """Frechet distance of two sets of pictures, by Gaussians fitted to their features (Heusel et al. 2017, eq. 6).

    d^2 = |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), in float64; [`compute`] sums over all processes. The covariance of
    n pictures has rank n - 1 at most: with fewer pictures than features the distance is biased upwards.

    Args:
        features: pictures (B, 3, H, W) in [-1, 1] to vectors (B, C): any function, such as
            [`~training.image_losses.BackboneFeatures.pooled`].
    """

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.features = features
        self.sums: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def update(self, pixels: torch.Tensor, real: bool) -> None:
        """Add pictures to the real or the made ones."""
        vectors = self.features(pixels).double()  # (B, C)
        parts = [torch.tensor(float(len(vectors)), device=vectors.device, dtype=torch.float64)]
        parts += [vectors.sum(0), vectors.T @ vectors]
        name = "real" if real else "made"
        previous = self.sums.get(name)
        self.sums[name] = parts if previous is None else [a + b for a, b in zip(previous, parts, strict=True)]

    def compute(self) -> float:
        """The squared distance, as it is always reported.

        Raises:
            ValueError: if there are fewer than two real or two made pictures.
        """
        moments = []
        for name in ("real", "made"):
            if name not in self.sums:
                raise ValueError(f"there are no {name} pictures: call update first, on every process")
            count, total, products = (sum_over_processes(part) for part in self.sums[name])
            if count < 2:
                raise ValueError(f"a covariance needs two pictures or more, got {int(count)} {name} ones")
            mean = total / count
            moments.append((mean, (products - count * torch.outer(mean, mean)) / (count - 1)))
        return frechet_distance(*moments[0], *moments[1])


def frechet_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two Gaussians; (C,) and (C, C), float64."""
    # tr (C C')^(1/2) = tr (S C' S)^(1/2) with S = C^(1/2), which is symmetric: its eigenvalues are real.
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    difference = (mean - other_mean).square().sum()
    return float(difference + covariance.trace() + other_covariance.trace() - 2 * cross)


def inception_features() -> Callable[[torch.Tensor], torch.Tensor]:
    """The 2,048 features of the Inception network that published Frechet Inception distances use, from torch-fidelity,
    which downloads its weights. It runs on the CPU until it is moved: it is a module with ``to``.

    Raises:
        ImportError: if torch-fidelity is not installed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("the Inception features need torch-fidelity: pip install torch-fidelity") from error

    class InceptionFeatures(FeatureExtractorInceptionV3):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            """Pictures (B, 3, H, W) in [-1, 1] to (B, 2048)."""
            bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            return super().forward(bytes_)[0]

    return InceptionFeatures("inception-v3-compat", ["2048"])
