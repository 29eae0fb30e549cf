"""Reading pictures as the tokenizers want them."""

from PIL import Image


def on_white(picture: Image.Image) -> Image.Image:
    """An RGB picture, transparent pixels on white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
