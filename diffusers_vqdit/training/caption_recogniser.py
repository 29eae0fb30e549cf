"""A recogniser that tells which of some English captions is said."""

import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ..utils.sounds import audio_library


RECOGNISER_RATE = 16_000  # Hz, of its acoustic model
DITHER, SILENCE = 1e-3, 0.3  # of a full scale, and seconds: it is lost in silence that is all zeros
BEAMS = {"beam": 1e-80, "wbeam": 1e-60, "pbeam": 1e-80}  # none of the captions is given up early


class CaptionRecogniser:
    """Which of some English captions is said: pocketsphinx with their grammar.

    Args:
        captions: those among which it chooses; without those that have a word its dictionary lacks.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        try:
            pocketsphinx = import_module("pocketsphinx")
        except ImportError as error:
            raise ImportError("pocketsphinx is needed to recognise speech: pip install pocketsphinx") from error
        self.decoder = pocketsphinx.Decoder(samprate=RECOGNISER_RATE, loglevel="FATAL", **BEAMS)
        said = {caption: spoken_words(caption) for caption in captions}
        known = {c: words for c, words in said.items() if words and all(map(self.decoder.lookup_word, words.split()))}
        self.captions = {words: caption for caption, words in known.items()}
        if not self.captions:
            raise ValueError("none of the captions has English words alone")
        self.decoder.add_jsgf_string(
            "captions", f"#JSGF V1.0; grammar captions; public <caption> = {' | '.join(self.captions)};"
        )
        self.decoder.activate_search("captions")

    def knows(self, caption: str) -> bool:
        return self.captions.get(spoken_words(caption)) is not None

    def hears(self, waveform: Any, sampling_rate: int, caption: str) -> bool:
        """Whether a sound (T,) is recognised as a caption."""
        return self._words(waveform, sampling_rate) == spoken_words(caption)

    def heard(self, waveform: Any, sampling_rate: int) -> str | None:
        """The caption that a sound (T,) is recognised as; None for none, such as the beginning of one."""
        return self.captions.get(self._words(waveform, sampling_rate) or "")

    def _words(self, waveform: Any, sampling_rate: int) -> str | None:
        samples = audio_library("soxr").resample(np.asarray(waveform, np.float32), sampling_rate, RECOGNISER_RATE)
        samples = np.pad(samples, int(SILENCE * RECOGNISER_RATE))
        samples = samples + DITHER * np.random.default_rng(0).standard_normal(len(samples))
        self.decoder.start_utt()
        self.decoder.process_raw((samples.clip(-1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return None if found is None else found.hypstr


def spoken_words(caption: str) -> str:
    """A caption's words as a dictionary has them."""
    return " ".join(re.findall(r"[a-z']+", caption.lower()))
