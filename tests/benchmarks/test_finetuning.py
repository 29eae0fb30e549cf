"""What the benchmark counts as right, and that what else is said goes to the training script."""

import json

import torch
from PIL import Image

from benchmarks import finetuning


def test_each_wrong_picture_and_caption_is_counted(pipeline, tmp_path, monkeypatch):
    """Of six pictures two are drawn for one another's captions, and one caption comes back with a letter less."""
    folder, captions = tmp_path / "pictures", [f"a dot {i}" for i in range(6)]
    folder.mkdir()
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join([*lines, json.dumps({"file_name": "x.png", "text": "broken"})]))
    (folder / "x.png").write_bytes(b"no picture")
    for i in range(6):
        Image.effect_noise((16, 16), 40 * i + 20).convert("RGB").save(folder / f"{i}.png")
    # All pictures keep their own pixels, which an untrained tokenizer would not.
    monkeypatch.setattr(finetuning, "reconstruct", lambda model, pictures, size: (None, pictures / 127.5 - 1))
    pipeline.save_pretrained(tmp_path / "out")
    given = {}

    def sample(pipeline, args, count, name, output, passed):
        given[output] = list(passed.values())[0]
        if output == "text":
            return [*captions[:5], "a dot"]
        pictures = torch.stack([torch.tensor(list(Image.open(folder / f"{i}.png").tobytes())) for i in range(6)])
        return pictures.view(6, 16, 16, 3).permute(0, 3, 1, 2)[[1, 0, 2, 3, 4, 5]] / 255

    monkeypatch.setattr(finetuning, "sample", sample)
    arguments = ["x", "--train_data_dir", str(folder), "--output_dir", str(tmp_path / "out"), "--max_train_steps", "9"]
    monkeypatch.setattr("sys.argv", arguments)
    args = finetuning.parse_args()
    found = finetuning.measure(args)
    assert args.more == ["--max_train_steps", "9"]
    assert given["image"] == captions and given["text"].shape == (6, 3, 16, 16)
    assert found["pictures right"]["value"] == 4 / 6 and found["pictures right"]["count"] == 6
    assert found["captions exact"]["value"] == 5 / 6 and found["wrong captions"] == {"a dot 5": "a dot"}
    assert Image.open(tmp_path / "out" / "finetuning.png").size == (6 * 16, 2 * 16)
