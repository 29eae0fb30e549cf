"""Short trainings of small transformers that benchmarks compare: the step, and what is measured after it."""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTTransformer2DModel
from diffusers_vqdit.likelihood.bounds import negative_elbo, stratified_masks
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.draws import step_generator
from diffusers_vqdit.training.masked_loss import masked_diffusion_loss
from diffusers_vqdit.utils.arguments import decay, model_name, positive_integer, positive_number, random_seed


ROOT = Path(__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser, **defaults: int | float) -> None:
    """The arguments that such benchmarks share."""
    parser.add_argument(
        "--pretrained_model_name_or_path", type=model_name, default=str(ROOT / "model_cards/vqdit-emoji-32")
    )
    parser.add_argument("--dataset_name", default=str(ROOT / "training/data/emoji.parquet"))
    parser.add_argument("--num_test_samples", type=positive_integer, default=64)
    parser.add_argument("--num_masks", type=positive_integer, default=8)
    parser.add_argument("--num_layers", type=positive_integer)
    parser.add_argument("--num_attention_heads", type=positive_integer)
    parser.add_argument("--attention_head_dim", type=positive_integer)
    parser.add_argument("--train_batch_size", type=positive_integer)
    parser.add_argument("--learning_rate", type=positive_number)
    parser.add_argument("--lr_warmup_steps", type=positive_integer, default=50)
    parser.add_argument("--ema_decay", type=decay, default=0.99)
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.set_defaults(**defaults)


class MaskedTraining:
    """A new transformer with its optimizer and its averaged weights.

    Args:
        args: from [`add_arguments`].
        options: of the transformer, beside its size.
    """

    def __init__(self, args: argparse.Namespace, **options) -> None:
        self.args, self.scheduler = args, MaskedDiffusionScheduler()
        torch.manual_seed(args.seed)
        self.model = VQDiTTransformer2DModel(
            num_attention_heads=args.num_attention_heads,
            attention_head_dim=args.attention_head_dim,
            num_layers=args.num_layers,
            **options,
        )
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.average = EMAModel(self.model.parameters(), decay=args.ema_decay)

    def step(self, number: int, codes: CodeDataset, task: Task, rows: torch.LongTensor | None = None) -> float:
        """The loss of step `number`, from 1 on, of `rows` or, where None, of some that it draws."""
        args = self.args
        generator = step_generator(args.seed, number)
        if rows is None:
            rows = torch.randint(len(codes), (args.train_batch_size,), generator=generator)
        given, generated = codes.batch(rows, task, generator=generator)
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, number / args.lr_warmup_steps)
        loss = masked_diffusion_loss(self.model, self.scheduler, given, generated, generator=generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.parameters())
        return loss.item()

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The averaged weights in the model, and no dropout."""
        self.model.eval()
        self.average.store(self.model.parameters())
        self.average.copy_to(self.model.parameters())
        yield
        self.average.restore(self.model.parameters())
        self.model.train()

    def state_dict(self) -> dict[str, dict]:
        """What a killed training goes on from."""
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "average")}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on from what [`state_dict`] gave."""
        for name in ("model", "optimizer", "average"):
            getattr(self, name).load_state_dict(state[name])


@torch.no_grad()
def bits_per_code(
    model: VQDiTTransformer2DModel, codes: CodeDataset, task: Task, num_samples: int, num_masks: int
) -> list[float]:
    """The negative ELBO of the generated side of the first samples, in bits a code, with the same masks for all."""
    given, generated = codes.batch(torch.arange(min(num_samples, len(codes))), task)
    total = sum(value[0].numel() for value in generated.values())
    masks, _ = stratified_masks(total, num_masks, torch.Generator().manual_seed(0))
    nll = negative_elbo(model, generated, model.encode_prefix(given) if given else None, masks).nll
    return (nll / total / math.log(2)).tolist()
