"""The checkpoint that writes poems by blocks: it keeps their form, whatever they say."""

import re
from collections import Counter

import pytest
import torch

from diffusers_vqdit import VQDiTPipeline


@pytest.fixture(scope="module")
def pipe(root):
    pipe = VQDiTPipeline.from_pretrained(root / "model_cards" / "vqdit-poems")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_poems_of_titles_have_lines_of_one_length(pipe):
    """Of real ones 93 in 100 have."""
    titles = ["月晦", "春日", "送友人", "登高", "夜雨", "江上"]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(titles))]
    poems = pipe(inputs={"title": titles}, output="poem", gen_length=72, generator=seeds).texts
    assert len(set(poems)) == len(poems)
    regular = lines = 0
    for poem in poems:
        lengths = [len(line) for line in re.split("[，。\n]", poem) if line]
        usual = Counter(lengths).most_common(1)[0][0]
        regular += sum(length == usual and usual in (5, 7) for length in lengths)
        lines += len(lengths)
    assert lines >= 4 * len(poems) and regular >= 0.9 * lines


def test_a_poem_that_is_begun_goes_on_as_it_began(pipe):
    (poem,) = pipe(
        inputs={"poem": "床前明月光，"}, output="poem", gen_length=40, generator=torch.Generator().manual_seed(0)
    ).texts
    assert poem.startswith("床前明月光，") and re.match("[^，。]{5}[，。]", poem[6:])
