"""Pictures as the models read them: square, on white."""

from io import BytesIO

from PIL import Image

SIDE = 224


def on_white(picture: Image.Image) -> Image.Image:
    """RGB, SIDE x SIDE, the whole picture centred on white."""
    rgba = picture.convert("RGBA")
    scale = SIDE / max(rgba.size)
    width, height = (max(1, round(length * scale)) for length in rgba.size)
    rgba = rgba.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    white.alpha_composite(rgba, ((SIDE - width) // 2, (SIDE - height) // 2))
    return white.convert("RGB")


def rendered(svg: bytes) -> Image.Image:
    """An SVG drawn as `on_white`."""
    import cairosvg  # only who makes the corpora needs it

    png = cairosvg.svg2png(bytestring=svg, output_width=2 * SIDE, output_height=2 * SIDE)
    return on_white(Image.open(BytesIO(png)))
