import datasets
import numpy as np

from benchmarks.cut_pictures import main, parse_args


def test_each_emoji_is_cut_to_every_size_and_kept_whole(root, tmp_path):
    emoji = root / "training/data/emoji.parquet"
    main(
        parse_args(
            f"--emoji_file {emoji} --every 300 --aspect_ratio_buckets 32,32;40,24;24,40 "
            f"--output_file {tmp_path / 'cuts.parquet'}".split()
        )
    )
    cuts, whole = (
        datasets.load_dataset("parquet", data_files=str(tmp_path / f"{name}.parquet"), split="train")
        for name in ("cuts", "cuts_whole")
    )
    trained = whole.filter(lambda row: row["split"] == "train")
    assert len(cuts) == 3 * len(trained) > 0 and not any(trained["skin_tone"])
    assert cuts[::3]["text"] == cuts[2::3]["text"] == trained[:]["text"]
    assert len(whole) - len(trained) == 307
    square, tall, wide = (np.asarray(row["image"]) for row in cuts.select(range(3)))
    side = len(square)
    assert tall.shape[:2] == (side, round(0.6 * side)) and wide.shape[:2] == (round(0.6 * side), side)
    pixels = np.asarray(trained[0]["image"].convert("RGBA"))
    opaque, start = pixels[..., 3] == 255, (side - tall.shape[1]) // 2
    columns = slice(start, start + tall.shape[1])
    assert opaque.any() and (square == pixels[..., :3])[opaque].all()
    assert (tall == pixels[:, columns, :3])[opaque[:, columns]].all()
