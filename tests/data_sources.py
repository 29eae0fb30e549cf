"""The same few samples as sources of several kinds."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


COUNT = 40
# By kind of source the columns of pictures, captions and labels.
COLUMNS = {"folder": ("image", "text", "label"), "parquet": ("image", "text", "label"), "tar": ("png", "txt", "cls")}


def write_pictures(folder):
    """A folder of pictures of several sizes, two of them broken, with captions of one or several wordings."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for index in range(COUNT):
        size = rng.integers(12, 40, 2)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
        texts = ["a red apple", "an apple"] if index % 5 == 0 else ["a blue box"]
        rows.append({"file_name": f"{index:02d}.png", "text": texts, "label": f"kind {index % 3}"})
    for index in (7, 30):
        (folder / f"{index:02d}.png").write_bytes(b"broken")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def source_of(pictures, folder, kind):
    """The arguments of the data: a folder of pictures, or what is in it as parquet files or tars of uneven lengths."""
    image_column, caption_column, label_column = COLUMNS[kind]
    columns = {"image_column": image_column, "columns": [caption_column, label_column]}
    if kind == "folder":
        return {"train_data_dir": str(pictures), **columns}
    folder.mkdir()
    rows = list(map(json.loads, (pictures / "metadata.jsonl").read_text().splitlines()))
    for shard, part in enumerate(np.split(np.arange(COUNT), [5, 16, 18])):
        found = [(rows[row], (pictures / rows[row]["file_name"]).read_bytes()) for row in part]
        if kind == "parquet":
            values = [{"bytes": data, "path": row["file_name"]} for row, data in found]
            images = pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
            table = {"image": images, **{name: [row[name] for row, _ in found] for name in ("text", "label")}}
            pq.write_table(pa.table(table), folder / f"{shard}.parquet", row_group_size=4)
            continue
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row, data in found:
                fields = {"png": data, "txt": row["text"][0].encode(), "cls": row["label"][-1:].encode()}
                for name, value in fields.items():
                    info = tarfile.TarInfo(f"{row['file_name'].removesuffix('.png')}.{name}")
                    info.size = len(value)
                    tar.addfile(info, io.BytesIO(value))
    return {"dataset_name": f"{folder}/*.parquet" if kind == "parquet" else str(folder), **columns}
