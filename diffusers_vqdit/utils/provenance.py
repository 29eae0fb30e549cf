"""Saving generated pictures and sounds with metadata that say so, for programs to read."""

import os
import re
from pathlib import Path
from xml.sax.saxutils import escape, unescape

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..version import __version__
from .checks import check_integer
from .wav_files import read_xmp, write_wav


# IPTC NewsCodes, https://cv.iptc.org/newscodes/digitalsourcetype
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"

# Where IPTC's Photo Metadata Standard puts the digital source type, and PNG its XMP packet.
_XMP_KEYWORD = "XML:com.adobe.xmp"
_XMP = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/">
   <Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
   <xmp:CreatorTool>{tool}</xmp:CreatorTool>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


def save_generated(
    image: Image.Image | np.ndarray | torch.Tensor,
    path: str | os.PathLike,
    *,
    model_id: str,
    description: str | None = None,
    composite: bool = False,
    sampling_rate: int | None = None,
) -> None:
    """Save a generated picture as PNG, or a sound as WAV, with metadata that say that it is synthetic and which model
    made it.

    It has an XMP packet with IPTC's digital source type, which programs and platforms read, and the same in text
    chunks for people. Editing or converting the file may remove both.

    Args:
        image: the picture, or a sound (T,) of floats.
        path: where to save it; must end in ``.png``, or for a sound in ``.wav``.
        model_id: repository or name of the checkpoint.
        description: such as the prompt.
        composite: whether parts of it were not generated, as after inpainting.
        sampling_rate: of a sound, in Hz.

    Raises:
        ValueError: if the path doesn't end so, or a sound has another shape or no sampling rate.
    """
    source, tool = COMPOSITE if composite else GENERATED, f"diffusers_vqdit {__version__}: {model_id}"
    suffix = ".png" if isinstance(image, Image.Image) else ".wav"
    if Path(path).suffix.lower() != suffix:
        raise ValueError(f"path={str(path)!r} must end in {suffix}, the format that carries the metadata")
    if not isinstance(image, Image.Image):
        if image.ndim != 1:
            raise ValueError(f"a sound must have shape (T,), got {tuple(image.shape)}")
        rate = check_integer("sampling_rate", sampling_rate, 1)
        texts = {"ISFT": tool, "ICMT": f"This sound is synthetic: a model has generated it, or a part of it. {source}"}
        texts |= {"INAM": description} if description is not None else {}
        packet = _XMP.format(source=source, tool=escape(tool))
        write_wav(path, np.asarray(image, dtype=np.float32), rate, texts, packet)
        return
    info = PngInfo()
    info.add_itxt(_XMP_KEYWORD, _XMP.format(source=source, tool=escape(tool)))
    info.add_itxt("Digital Source Type", source)
    info.add_itxt("Software", tool)
    info.add_itxt("Disclaimer", "This picture is synthetic: a model has generated it, or a part of it.")
    if description is not None:
        info.add_itxt("Description", description)
    image.save(path, pnginfo=info)


def digital_source_type(path: str | os.PathLike) -> str | None:
    """IPTC's digital source type in the XMP packet of a PNG or WAV file; None for one without it."""
    if Path(path).suffix.lower() == ".wav":
        packet = read_xmp(path) or ""
    else:
        with Image.open(path) as image:
            packet = getattr(image, "text", {}).get(_XMP_KEYWORD, "")
    match = re.search(r"<Iptc4xmpExt:DigitalSourceType>(.*?)</", packet)
    return unescape(match[1]) if match is not None else None
