"""Files of tables: single ones, patterns of them, folders of shards and of tars all give the same samples."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.training.table_files import find_table_files


COUNT = 6


def picture(row):
    data = io.BytesIO()
    Image.fromarray(np.full((9, 8, 3), 20 * row, np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for name in ("tars", "shards", "texts"):
        (root / name).mkdir()
    rows = [{"image": f"{row}.png", "text": f"caption {row}"} for row in range(COUNT)]
    for row, one in enumerate(rows):
        (root / "texts" / one["image"]).write_bytes(picture(row))
    (root / "texts" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "texts" / "a.csv").write_text("image,text\n" + "".join(f"{r['image']},{r['text']}\n" for r in rows))
    for shard, part in enumerate(np.array_split(np.arange(COUNT), 2)):
        table = {"image": [picture(row) for row in part], "text": [f"caption {row}" for row in part]}
        pq.write_table(pa.table(table), root / "shards" / f"train-{shard}.parquet")
        with tarfile.open(root / "tars" / f"train-{shard}.tar", "w") as file:
            for row in part:
                for ending, data in (("png", picture(row)), ("txt", f"caption {row}".encode())):
                    info = tarfile.TarInfo(f"{row:04d}.{ending}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
    return root


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, range(COUNT)) for name in ("tars", "tars/*.tar", "tars/train-?.tar", "shards", "shards/*.parquet")),
        *(("texts/a.jsonl", range(COUNT)), ("texts/a.csv", range(COUNT)), ("**/*.tar", range(COUNT))),
        *(("tars/train-1.tar", range(3, 6)), ("shards/train-0.parquet", range(3))),
    ],
)
def test_samples_are_those_of_the_files(sources, tmp_path, name, rows):
    image, text = ("png", "txt") if name.endswith((".tar", "tars")) else ("image", "text")
    dataset = load_training_dataset(
        dataset_name=str(sources / name), image_column=image, columns=[text], cache_dir=str(tmp_path)
    )
    pictures, kept = decode_images(dataset, image, 8)
    assert pictures[:, 0, 0, 0].tolist() == [20 * row for row in rows] and kept == list(range(len(rows)))
    assert list(dataset[text]) == [f"caption {row}" for row in rows]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/*.tar", "matches no file"),
        ("texts/*", "has files that end in '.csv', '.jsonl', '.png'; give files of one kind"),
        ("texts/*.png", "end in '.png'; give files of one kind of .parquet, .arrow, .tar, .csv"),
        ("texts/b.csv", "there is no such file"),
    ],
)
def test_other_names_are_refused_with_what_was_found(sources, name, message):
    with pytest.raises(ValueError, match=message):
        load_training_dataset(dataset_name=str(sources / name))


def test_names_of_the_hub_and_folders_are_no_files(tmp_path):
    assert find_table_files("user/data") == find_table_files(str(tmp_path)) == []
