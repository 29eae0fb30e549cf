import json

from benchmarks.text_positions import main, parse_args
from diffusers_vqdit import TextVQModel


def test_each_tokenizer_has_a_row(tmp_path, tokenizer):
    residual = {"quantizer_type": "rvq", "codebook_norm": "none", "num_quantizers": 2, "downsample_factor": 2}
    for number, options in enumerate(({}, residual)):
        model = TextVQModel(
            vocab_size=len(tokenizer), max_length=12, hidden_size=16, num_codes=32, code_dim=8, **options
        )
        model.save_pretrained(tmp_path / f"{number}")
        tokenizer.save_pretrained(tmp_path / f"{number}" / "tokenizer")
    size = "--num_layers 1 --num_attention_heads 1 --attention_head_dim 8"
    data = "--max_train_samples 8 --num_test_samples 4 --num_masks 2"
    found = main(
        parse_args(
            f"--text_vq {tmp_path / '0'} {tmp_path / '1'} {size} {data} --max_train_steps 2 --train_batch_size 4 "
            f"--output_dir {tmp_path / 'out'}".split()
        )
    )
    assert [row["positions"] for row in found] == [12, 6] and found[0]["time"] == 1
    for row in found:
        assert 0 < row["text->image"][0] < 14 and row["image->text"][1] > 0
    assert json.loads((tmp_path / "out" / "text_positions.json").read_text()) == found
