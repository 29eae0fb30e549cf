#!/usr/bin/env python
"""How soon a new transformer tells labels from codes, with embeddings that begin at the codes' vectors and without.

    python training/encode_dataset.py --dataset_name outputs/digits.parquet --image_vq model_cards/vqdit-emoji-32 \
        --label_column label --output_dir outputs/codes
    python -m benchmarks.code_embeddings --codes_dir outputs/codes --image_vq model_cards/vqdit-emoji-32

trains ``image->label`` from scratch on eleven in twelve of the rows, twice for each seed, with the same weights
otherwise, the same batches and the same masks, and prints the loss of the last steps and the share of the held-out
rows that are labelled right. Some four minutes of a CPU core a seed.
"""

import argparse

import torch

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTTransformer2DModel
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.code_embeddings import start_embeddings
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.draws import step_generator
from diffusers_vqdit.training.masked_loss import masked_diffusion_loss, stratified_timesteps
from diffusers_vqdit.training.optimization import parameter_groups
from diffusers_vqdit.training.row_order import shuffled_batches
from diffusers_vqdit.training.tokenizers import load_image_vq
from diffusers_vqdit.utils.arguments import argument_parser, model_name, positive_integer, positive_number, random_seed


TASK = Task.parse("image->label")
HELD_OUT = 12  # one row in so many


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Embeddings of codes that begin at the codes' vectors, beside random ones.")
    parser.add_argument("--codes_dir", required=True, help="With the segments image and label.")
    parser.add_argument("--image_vq", type=model_name, required=True, help="That made the codes.")
    parser.add_argument("--max_train_steps", type=positive_integer, default=250)
    parser.add_argument("--train_batch_size", type=positive_integer, default=32)
    parser.add_argument("--learning_rate", type=positive_number, default=1e-3)
    parser.add_argument("--num_layers", type=positive_integer, default=4)
    parser.add_argument("--num_attention_heads", type=positive_integer, default=3)
    parser.add_argument("--seeds", type=random_seed, nargs="+", default=[0, 1])
    return parser.parse_args(input_args)


def train(
    args: argparse.Namespace, codes: CodeDataset, seed: int, image_vq: torch.nn.Module | None
) -> tuple[float, float]:
    """The mean loss of the last tenth of the steps, and the share of held-out rows that are labelled right."""
    torch.manual_seed(seed)
    model = VQDiTTransformer2DModel(
        segments={name: codes.segments[name] for name in TASK.segments},
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=64,
    )
    if image_vq is not None:
        start_embeddings(model, {"image": image_vq})
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=args.learning_rate, betas=(0.9, 0.98))
    rows = torch.arange(len(codes))
    learned, held_out = rows[rows % HELD_OUT != 0], rows[rows % HELD_OUT == 0]
    batches = shuffled_batches(len(learned), args.train_batch_size, seed=seed)
    losses, warmup = [], max(1, args.max_train_steps // 20)
    for step in range(args.max_train_steps):
        generator = step_generator(seed, step)
        given, generated = codes.batch(learned[next(batches)], TASK, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / warmup)
        times = stratified_timesteps(args.train_batch_size, generator)
        loss = masked_diffusion_loss(
            model, MaskedDiffusionScheduler(), given, generated, timesteps=times, generator=generator
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    with torch.no_grad():
        given, generated = codes.batch(held_out, TASK, generator=step_generator(seed, 0))
        masked = torch.full_like(generated["label"], codes.segments["label"]["vocab_size"])
        found = model({"label": masked}, given=given).sample["label"].argmax(-1)
    right = (found.flatten() == generated["label"].flatten()).float().mean().item()
    return sum(last) / len(last), right


def main(args: argparse.Namespace) -> None:
    codes, image_vq = CodeDataset(args.codes_dir), load_image_vq(args.image_vq).eval()
    print("| seed | embeddings begin at | loss at the end, nats | held-out labels right |\n|---|---|---|---|")
    for seed in args.seeds:
        for name, vectors in (("random vectors", None), ("the codes' vectors", image_vq)):
            loss, right = train(args, codes, seed, vectors)
            print(f"| {seed} | {name} | {loss:.2f} | {100 * right:.0f} % |", flush=True)


if __name__ == "__main__":
    main(parse_args())
