"""Images in the form that the models read: square, on white."""

from io import BytesIO

from PIL import Image

SIDE = 224


def on_white(picture: Image.Image) -> Image.Image:
    """Return an RGB image of SIDE x SIDE, with the whole image centred on white."""
    rgba = picture.convert("RGBA")
    scale = SIDE / max(rgba.size)
    width, height = (max(1, round(length * scale)) for length in rgba.size)
    rgba = rgba.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    white.alpha_composite(rgba, ((SIDE - width) // 2, (SIDE - height) // 2))
    return white.convert("RGB")


def rendered(svg: bytes) -> Image.Image:
    """Render an SVG, and return it like `on_white`."""
    import cairosvg  # only needed to make the corpora

    png = cairosvg.svg2png(bytestring=svg, output_width=2 * SIDE, output_height=2 * SIDE)
    return on_white(Image.open(BytesIO(png)))
