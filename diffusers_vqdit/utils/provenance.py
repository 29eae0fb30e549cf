"""Saving generated pictures with metadata that say so, for programs to read."""

import os
import re
from pathlib import Path
from xml.sax.saxutils import escape, unescape

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..version import __version__


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
    image: Image.Image,
    path: str | os.PathLike,
    *,
    model_id: str,
    description: str | None = None,
    composite: bool = False,
) -> None:
    """Save a generated picture as PNG, with metadata that say that it is synthetic and which model made it.

    It has an XMP packet with IPTC's digital source type, which picture programs and platforms read, and the same in
    text chunks for people. Editing or converting the picture may remove both.

    Args:
        image: the picture.
        path: where to save it; must end in ``.png``.
        model_id: repository or name of the checkpoint.
        description: such as the prompt.
        composite: whether parts of the picture were not generated, as after inpainting.

    Raises:
        ValueError: if the path doesn't end in ``.png``.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path={str(path)!r} must end in .png, the format that carries the metadata")
    source, tool = COMPOSITE if composite else GENERATED, f"diffusers_vqdit {__version__}: {model_id}"
    info = PngInfo()
    info.add_itxt(_XMP_KEYWORD, _XMP.format(source=source, tool=escape(tool)))
    info.add_itxt("Digital Source Type", source)
    info.add_itxt("Software", tool)
    info.add_itxt("Disclaimer", "This picture is synthetic: a model has generated it, or a part of it.")
    if description is not None:
        info.add_itxt("Description", description)
    image.save(path, pnginfo=info)


def digital_source_type(path: str | os.PathLike) -> str | None:
    """IPTC's digital source type in a PNG's XMP packet; None for a picture without it."""
    with Image.open(path) as image:
        packet = getattr(image, "text", {}).get(_XMP_KEYWORD, "")
    match = re.search(r"<Iptc4xmpExt:DigitalSourceType>(.*?)</", packet)
    return unescape(match[1]) if match is not None else None
