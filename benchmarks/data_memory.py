#!/usr/bin/env python
"""Peak memory of the training scripts over few and many samples: what they read stays on disk.

    python -m benchmarks.data_memory --photographs my_pictures --counts 1000 20000 --code_counts 10000 1000000

cuts 256 px JPEG pictures out of photographs (out of coloured noise without any), writes them into parquet files, and
simulates codes, sounds and captions; then runs encode_dataset.py over all pictures, copied and streamed,
train_image_vq.py and train_latent_dit.py (copied and streamed) for a few steps, and train_vqdit.py, which encodes them
at its start; then encode_dataset.py and train_image_vq.py over folders of such pictures with metadata, train_vqdit.py
over the codes, train_audio_vq.py over the sounds, train_latent_dit.py over small pictures with five captions each, and
train_text_vq.py over captions alone, the sounds and the captions copied and streamed, too, with models as small as
they can be.

Prints the peak of each process: ``anonymous`` memory is the program's own; ``resident`` also counts pages of mapped
files, which the system keeps while it has no other use for them. 20,000 pictures take about half an hour of two CPU
cores and 2 GB of disk.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from datasets import Audio, Features
from PIL import Image

from diffusers_vqdit import ImageVQModel, TextVQModel
from diffusers_vqdit.training.byte_pairs import train_tokenizer
from diffusers_vqdit.training.code_files import write_index, write_shard
from diffusers_vqdit.utils.arguments import argument_parser, non_negative_integer, output_path, positive_integer


ROOT = Path(__file__).resolve().parent.parent
SIDE = 256


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Measure the peak memory of the training scripts.")
    parser.add_argument("--photographs", type=Path, help="Folder of pictures of at least 256 px to cut others out of.")
    parser.add_argument("--counts", type=positive_integer, nargs="*", default=[1000, 20_000], help="Pictures.")
    parser.add_argument("--folder_counts", type=positive_integer, nargs="*", default=[1000, 20_000], help="Pictures.")
    parser.add_argument("--code_counts", type=positive_integer, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--sound_counts", type=positive_integer, nargs="*", default=[1000, 20_000])
    parser.add_argument("--caption_counts", type=positive_integer, nargs="*", default=[1000, 20_000], help="Pictures.")
    parser.add_argument("--text_counts", type=positive_integer, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--max_train_steps", type=positive_integer, default=10)
    parser.add_argument(
        "--encoding_resolution",
        type=positive_integer,
        default=SIDE,
        help="That pictures are encoded at, a multiple of 32.",
    )
    parser.add_argument("--dataloader_num_workers", type=non_negative_integer, default=0)
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/data_memory"))
    return parser.parse_args(input_args)


def crops(photographs: Path | None, count: int, seed: int = 0) -> Iterator[bytes]:
    """JPEG pictures, each of another place of one of the photographs."""
    rng = np.random.default_rng(seed)
    paths = sorted(path for path in photographs.rglob("*.jp*g")) if photographs is not None else []
    sources = [picture.convert("RGB") for picture in map(Image.open, paths[:20]) if min(picture.size) >= SIDE]
    if not sources:
        noise = rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)
        sources = [Image.fromarray(noise).resize((2700, 1800), Image.Resampling.BICUBIC)]
    for index in range(count):
        source = sources[index % len(sources)]
        left, top = (int(rng.integers(0, size - SIDE + 1)) for size in source.size)
        data = io.BytesIO()
        source.crop((left, top, left + SIDE, top + SIDE)).save(data, "JPEG", quality=90)
        yield data.getvalue()


def write_pictures(path: Path, photographs: Path | None, count: int) -> None:
    """A parquet file of pictures and captions, in row groups of a few."""
    kind = pa.schema([("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})), ("text", pa.string())])
    with pq.ParquetWriter(path, kind) as writer:
        rows: list[dict] = []
        for index, data in enumerate(crops(photographs, count)):
            rows.append({"image": {"bytes": data, "path": None}, "text": f"a picture, the {index % 100}th"})
            if len(rows) == 100 or index == count - 1:
                writer.write_table(pa.Table.from_pylist(rows, kind))
                rows = []


def write_folder(folder: Path, photographs: Path | None, count: int) -> None:
    """A folder of pictures, with captions of some 200 characters in its metadata, no two alike."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for index, data in enumerate(crops(photographs, count)):
            name = f"photograph-{index:06d}.jpg"
            (folder / name).write_bytes(data)
            text = f"the {index}th picture, in its only wording " * 5
            metadata.write(json.dumps({"file_name": name, "text": text}) + "\n")


def write_sounds(path: Path, count: int, seconds: float = 2.0, rate: int = 11025) -> None:
    """A parquet file of FLAC sounds, each a tone of its own."""
    features = Features({"audio": Audio(rate)})
    with pq.ParquetWriter(path, features.arrow_schema) as writer:
        for start in range(0, count, 100):
            rows = []
            for index in range(start, min(start + 100, count)):
                data = io.BytesIO()
                tone = 0.5 * np.sin(np.arange(int(seconds * rate)) * (0.05 + index / count))
                soundfile.write(data, tone, rate, format="FLAC")
                rows.append({"audio": {"bytes": data.getvalue(), "path": None}})
            writer.write_table(pa.Table.from_pylist(rows, features.arrow_schema))


def write_captioned(path: Path, count: int) -> None:
    """A parquet file of small PNG pictures, each with five captions of some 200 characters, no two alike."""
    kind = pa.schema(
        [("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})), ("text", pa.list_(pa.string()))]
    )
    with pq.ParquetWriter(path, kind) as writer:
        for start in range(0, count, 100):
            rows = []
            for index in range(start, min(start + 100, count)):
                data = io.BytesIO()
                Image.new("RGB", (32, 32), (index % 256, index // 256 % 256, 0)).save(data, "PNG")
                texts = [f"the {index}th picture, in the {number}th wording " * 5 for number in range(5)]
                rows.append({"image": {"bytes": data.getvalue(), "path": None}, "text": texts})
            writer.write_table(pa.Table.from_pylist(rows, kind))


def write_texts(path: Path, count: int) -> None:
    """A parquet file of captions of some 60 characters, no two alike, of a few words, which a tokenizer counts."""
    kind = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, kind) as writer:
        for start in range(0, count, 10_000):
            rows = range(start, min(start + 10_000, count))
            texts = [
                f"picture {' '.join(str(row))} of a photograph, in the {row % 1013}th of its wordings" for row in rows
            ]
            writer.write_table(pa.table({"text": texts}, kind))


def write_codes(folder: Path, count: int) -> None:
    """A folder of simulated codes (8, 8) of 1024."""
    folder.mkdir(parents=True)
    shards = []
    for start in range(0, count, 100_000):
        rows = torch.randint(1024, (min(100_000, count - start), 8, 8))
        path = folder / f"codes-{len(shards):05d}.arrow"
        shards.append(write_shard(path, {"image": list(rows)}, {"image": 1024}))
    segment = {"vocab_size": 1024, "shape": [8, 8], "modality": "image", "tokenizer": "image_vq"}
    index = {"segments": {"image": segment}, "labels": [], "lowres_factor": None, "settings": {"resize_mode": "crop"}}
    write_index(folder, {**index, "fingerprints": {"data": "simulated"}, "source": "simulated", "shards": shards})


def peak(script: str, arguments: str, log: Path) -> tuple[float, float]:
    """MB of anonymous and of resident memory of a script, at most."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "training" / f"{script}.py"), *arguments.split()]
    anonymous = resident = 0
    with open(log, "w") as output:
        process = psutil.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        while process.poll() is None:
            try:
                memory = process.memory_info()
            except psutil.Error:
                continue
            anonymous, resident = max(anonymous, memory.rss - memory.shared), max(resident, memory.rss)
            time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{script} failed: {log.read_text()[-2000:]}")
    return anonymous / 1e6, resident / 1e6


def main(args: argparse.Namespace) -> None:
    out = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    small = {"down_block_types": ("DownEncoderBlock2D",) * 6, "up_block_types": ("UpDecoderBlock2D",) * 6}
    small |= {"block_out_channels": (4,) * 6, "norm_num_groups": 2, "latent_channels": 4, "num_vq_embeddings": 1024}
    ImageVQModel(**small, sample_size=args.encoding_resolution).save_pretrained(out / "image_vq")
    tokenizer = train_tokenizer(["the 0123456789th picture, in the 0th wording"], 300, 32)
    tokenizer.save_pretrained(out / "text_vq" / "tokenizer")
    sizes = {"max_length": 32, "num_codes": 64, "hidden_size": 8, "code_dim": 4}
    TextVQModel(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes).save_pretrained(
        out / "text_vq"
    )
    tiny = "--num_layers 1 --num_attention_heads 1 --attention_head_dim 8 --report_to none --train_batch_size 8"
    steps = f"--max_train_steps {args.max_train_steps} --checkpointing_steps 0 --validation_steps 0"
    model = "--block_out_channels 4 4 4 4 4 4 --norm_num_groups 2 --latent_channels 4 --num_vq_embeddings 64"
    vq = f"--image_vq {out / 'image_vq'} --resolution {args.encoding_resolution}"
    reading = f"--cache_dir {out / 'cache'} --dataloader_num_workers {args.dataloader_num_workers}"
    more = f"--report_to none --train_batch_size 4 --resolution {SIDE} --validation_split none"
    print("| script | samples | anonymous, MB | resident, MB |\n|---|---|---|---|", flush=True)

    def measure(script: str, count: int, arguments: str, of: str = "", flag: str = "") -> None:
        name = f"{script}-{count}{of.replace(' (', '-').rstrip(')')}{flag}"
        found = peak(script, f"{arguments} {flag} --output_dir {out / name}", out / f"{name}.log")
        print(f"| {script}.py{of} {flag} | {count:,} | {found[0]:.0f} | {found[1]:.0f} |", flush=True)

    def written(kind: str, count: int, write: Callable[[Path, int], None]) -> str:
        path = out / f"{kind}-{count}.parquet"
        if not path.is_file():
            write(path, count)
        return f"--dataset_name {path} --cache_dir {out / 'cache'}"

    for count in args.counts:
        path = out / f"pictures-{count}.parquet"
        if not path.is_file():
            write_pictures(path, args.photographs, count)
        data = f"--dataset_name {path} {reading}"
        measure("train_image_vq", count, f"{data} {model} {more} {steps}")
        for flag in ("", "--streaming"):
            measure("encode_dataset", count, f"{data} {vq} --batch_size 16", flag=flag)
        for flag in ("", "--streaming"):
            measure("train_latent_dit", count, f"{data} {vq} {tiny} {steps}", flag=flag)
        encoded = f"--image_vq {out / 'image_vq'} --tasks=->image"
        measure("train_vqdit", count, f"{data} {encoded} {tiny} {steps}", " (pictures)")
    for count in args.folder_counts:
        folder = out / f"folder-{count}"
        if not folder.is_dir():
            write_folder(folder, args.photographs, count)
        data = f"--train_data_dir {folder} {reading}"
        texts = f"--text_vq {out / 'text_vq'} --caption_column text"
        measure("train_image_vq", count, f"{data} {model} {more} {steps}", " (folder)")
        measure("encode_dataset", count, f"{data} {vq} {texts} --batch_size 16", " (folder)")
    for count in args.code_counts:
        if not (out / f"codes-{count}").is_dir():
            write_codes(out / f"codes-{count}", count)
        codes = f"--codes_dir {out / f'codes-{count}'} --image_vq {out / 'image_vq'} --tasks ->image"
        measure("train_vqdit", count, f"{codes} {tiny} {steps}".replace("--tasks ", "--tasks="))
    for count in args.sound_counts:
        data = written("sounds", count, write_sounds) + " --validation_split none --report_to none"
        shape = "--n_fft 256 --num_mel_bins 16 --block_out_channels 4 4 --norm_num_groups 2 --latent_channels 4"
        for flag in ("", "--streaming"):
            measure("train_audio_vq", count, f"{data} {shape} --num_vq_embeddings 64 {steps}", flag=flag)
    for count in args.caption_counts:
        data = written("captions", count, write_captioned) + " --caption_columns text --resolution 64"
        data += f" --image_vq {out / 'image_vq'} --text_vq {out / 'text_vq'} --patch_size 1"
        measure("train_latent_dit", count, f"{data} {tiny} {steps}", " (captions)")
    for count in args.text_counts:
        data = written("texts", count, write_texts) + " --validation_split none --report_to none"
        small = "--max_length 32 --num_codes 64 --hidden_size 8 --code_dim 4 --tokenizer_vocab_size 512"
        for flag in ("", "--streaming", "--pack_captions"):
            measure("train_text_vq", count, f"{data} {small} {steps}", flag=flag)


if __name__ == "__main__":
    main(parse_args())
