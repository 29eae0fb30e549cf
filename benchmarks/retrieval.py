#!/usr/bin/env python
"""Retrieval by the 32 px starter: indexing rate, query latency, and recall against the size of the shortlist.

    python benchmarks/retrieval.py

Takes a minute and a half on two threads of an AMD EPYC. With the 32 px starter: text queries of the test split's 307
pictures have recall@1 80.1 % and recall@5 84.7 % (84.0 % with a shortlist of 5); pictures of 10,000 are indexed at
10,200 a second from their codes; a query of them takes 113 ms, a pass for each item 41 s, 364 times as long. Picture
queries of 307 texts have 78.8 % and 84.4 %; among 10,000 a query takes 126 ms, a pass for each 127 times as long. 71
of the 307 are emoji that training never saw, and hold recall down.

The gallery of 10,000 is drawn with repeats from the test split's codes: latency hardly depends on what the items are.
Beside it stands one pass for each item with half of its codes masked, the least that ranking by bounds takes whose
masks leave a part of each item; it is timed on 256 and scaled to their number. (With all codes masked no pass would
be needed but one: so the index does it.)
"""

import argparse
import time

import torch

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.likelihood.retrieval import build_index, retrieve
from diffusers_vqdit.pipelines.text_segment import encode_texts
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.utils.arguments import argument_parser, model_name, positive_integer
from diffusers_vqdit.utils.decoding import to_pixels


def parse_args() -> argparse.Namespace:
    parser = argument_parser("Measure retrieval.")
    parser.add_argument("--pretrained_model_name_or_path", type=model_name, default="model_cards/vqdit-emoji-32")
    parser.add_argument("--dataset_name", default="training/data/emoji.parquet")
    parser.add_argument("--items", type=positive_integer, default=10_000)
    parser.add_argument("--shortlists", type=positive_integer, nargs="+", default=[5, 20])
    return parser.parse_args()


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    pipe = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
    data = load_training_dataset(dataset_name=args.dataset_name, split="test", image_column="image", columns=["text"])
    pixels = to_pixels(decode_images(data, "image", 32)[0])
    codes = {
        "image": torch.cat([pipe.image_vq.encode_codes(part) for part in pixels.split(64)]),
        "text": encode_texts(list(data["text"]), pipe.text_vq, pipe.tokenizer),
    }
    own = torch.arange(len(data))[:, None]
    for query, segment in (("text", "image"), ("image", "text")):
        print(f"{query} -> gallery of {segment}")

        gallery = build_index(pipe.transformer, codes[segment], segment, query)
        for shortlist in args.shortlists:
            found = retrieve(pipe.transformer, codes[query], gallery, top_k=5, shortlist=shortlist).indices == own
            recall = ", ".join(f"recall@{k} {100 * found[:, :k].any(1).float().mean():.1f} %" for k in (1, 5))
            print(f"  shortlist {shortlist:4d} of {len(gallery)}: {recall}")

        drawn = torch.randint(len(data), (args.items,), generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        gallery = build_index(pipe.transformer, codes[segment][drawn], segment, query)
        rate = len(gallery) / (time.perf_counter() - start)
        print(f"  indexing {len(gallery)} items: {rate:.0f} a second, codes given")
        one = codes[query][:1]
        retrieve(pipe.transformer, one, gallery, top_k=5, shortlist=20)  # faiss, where there is one, builds its index
        start = time.perf_counter()
        for _ in range(3):
            retrieve(pipe.transformer, one, gallery, top_k=5, shortlist=20)
        latency = (time.perf_counter() - start) / 3
        prefix = pipe.transformer.encode_prefix({query: one})
        size = 256
        items = codes[segment][drawn[:size]]
        masked = torch.rand(items.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        hidden = items.masked_fill(masked, pipe.transformer.config.segments[segment]["vocab_size"])
        start = time.perf_counter()
        for chunk, true in zip(hidden.split(64), items.split(64), strict=True):
            logits = pipe.transformer({segment: chunk}, prefix=prefix.expand(len(chunk))).sample[segment]
            logits.log_softmax(-1).gather(-1, true.flatten(1)[..., None])
        everything = (time.perf_counter() - start) * len(gallery) / size
        print(
            f"  one query of {len(gallery)} items: {1000 * latency:.0f} ms with a shortlist of 20; one pass "
            f"for each item: {everything:.1f} s, {everything / latency:.0f} times as long"
        )


if __name__ == "__main__":
    main(parse_args())
