import sys
import types

import pytest
import torch
import torch.multiprocessing as mp

from diffusers_vqdit.training.frechet_distance import FrechetDistance, inception_features
from diffusers_vqdit.training.metrics import code_usage, psnr, ssim
from diffusers_vqdit.training.tokenizer_metrics import measure_image_tokenizer
from diffusers_vqdit.utils.decoding import to_pixels


def features(pixels):
    return pixels.mean((2, 3))


def pictures():
    return torch.randint(256, (15, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_figures_are_those_of_the_whole_set_in_any_batches(image_vq):
    original = to_pixels(pictures())
    with torch.no_grad():
        codes = image_vq.encode_codes(original)
        decoded = image_vq.decode_codes(codes).sample.clamp(-1, 1)
    distance = FrechetDistance(features)
    distance.update(original, real=True)
    distance.update(decoded, real=False)
    usage, perplexity = code_usage(codes, image_vq.num_codes)
    for batch_size in (4, 64):
        figures = measure_image_tokenizer(image_vq, pictures().split(batch_size), features=features)
        assert figures == pytest.approx(
            {
                "psnr": float(psnr(decoded, original).mean()),
                "ssim": float(ssim(decoded, original).mean()),
                "mse": float((decoded - original).square().mean()),
                "usage": usage,
                "perplexity": perplexity,
                "count": 15,
                "rfid": distance.compute(),
            },
            rel=1e-4,
        )
    assert "rfid" not in measure_image_tokenizer(image_vq, [pictures()])


def _measure(rank, model, path, queue):
    torch.set_num_threads(1)  # a forked process must not wait for its parent's threads
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    queue.put(measure_image_tokenizer(model, [pictures()[rank::2]], features=features))
    torch.distributed.destroy_process_group()


def test_two_processes_measure_what_one_does(image_vq, tmp_path):
    context = mp.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_measure, args=(r, image_vq, tmp_path / "store", queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    both = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    alone = measure_image_tokenizer(image_vq, [pictures()], features=features)
    for figures in both:
        assert figures == pytest.approx(alone, rel=1e-4)


def test_inception_takes_bytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        inception_features()

    class Extractor(torch.nn.Module):
        def __init__(self, name, features_list):
            super().__init__()
            assert features_list == ["2048"]

        def forward(self, pixels):
            assert pixels.dtype == torch.uint8
            return (pixels.float().mean((2, 3)),)

    module = types.SimpleNamespace(FeatureExtractorInceptionV3=Extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    pixels = torch.tensor([-1.0, 0.0, 2.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert inception_features()(pixels).tolist() == [[0.0, 128.0, 255.0]] * 2
