"""Byte-level BPE tokenizers, trained on one's own texts."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..utils.token_ids import BLANK, END_TOKEN


PAD = "<pad>"


def text_normalizer(lower_case: bool, keep_spaces: bool = False) -> normalizers.Normalizer:
    """One spelling for texts that look alike: composed characters (NFC), no invisible ones, single spaces unless all
    are kept."""
    invisible = Regex(r"[\x{0}-\x{8}\x{E}-\x{1F}\x{7F}\x{AD}\x{200B}\x{2060}\x{FEFF}]")  # byte order mark, ...
    steps = [normalizers.NFC(), normalizers.Replace(invisible, "")]
    if not keep_spaces:
        steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return normalizers.Sequence([*steps, *([normalizers.Lowercase()] if lower_case else [])])


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of captions with a token for padding and one for a blank to fill in.

    It gives texts back as its normaliser writes them, in lower case where all captions are, which are read twice.
    """
    normalizer = text_normalizer(lower_case=all(text == text.lower() for text in captions))
    special = {"pad_token": PAD, "mask_token": BLANK}
    return _train(captions, vocab_size, normalizer, special, model_max_length=max_length)


def train_text_tokenizer(texts: Iterable[str], vocab_size: int, characters: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of texts of any length, with an end of texts. It keeps lines, spaces and case.

    Args:
        characters: that no token is longer than a character, so that a mask hides one where the vocabulary has them
            all: of the others it hides bytes.
    """
    special = {"pad_token": PAD, "mask_token": BLANK, "eos_token": END_TOKEN}
    return _train(texts, vocab_size, text_normalizer(lower_case=False, keep_spaces=True), special, characters)


def _train(
    texts: Iterable[str],
    vocab_size: int,
    normalizer: normalizers.Normalizer,
    special: dict[str, str],
    characters: bool = False,
    **options: int,
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if characters:
        apart = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([apart, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # Found after the normaliser has read the whole text: else it would strip the spaces beside a blank.
        special_tokens=[AddedToken(token, normalized=True, special=True) for token in special.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special, **options
    )
