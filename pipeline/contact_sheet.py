"""Contact sheets: rows of captioned pictures, as a PNG or as a self-contained HTML page."""

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

TILE = 224
GAP = 12
CAPTION = 22
HEADER = 76
PAPER, INK, FAINT = (250, 250, 248), (30, 30, 30), (120, 120, 120)
TILE_BACKGROUND = (228, 228, 224)
"""Color of the part of a tile that its image leaves free."""
QUERY, KEY = (0, 114, 178), (213, 94, 0)  # safe for color-blind readers (Okabe and Ito)

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; background: #fafaf8; color: #1e1e1e }
h1 { font-size: 1.2rem } p { color: #666; max-width: 60rem }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 0.75rem;
          padding: 0.75rem 0; border-top: 1px solid #ddd }
figure { margin: 0; max-width: 224px }
figure img { width: 100%; display: block }
figcaption { font-size: 0.8rem; overflow-wrap: anywhere } figcaption b { font-weight: 600 }
.query b { color: #0072b2 } .key b { color: #d55e00 }
"""


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet.

    Attributes:
        column: heading of the column.
        picture: image of TILE x TILE pixels.
        caption: text below the picture.
        branch: "query" or "key" colors the heading; empty for neither.
    """

    column: str
    picture: Image.Image
    caption: str
    branch: str = ""


def fit_into_tile(image: Image.Image) -> Image.Image:
    """Resize an image so that its longer side is TILE pixels; the other is at least one pixel."""
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def fit_letterbox(
    image: Image.Image,
) -> tuple[Image.Image, Callable[[float, float], tuple[float, float]]]:
    """Fit an image into a tile; also return the map from relative (x, y) to pixels of the tile."""
    fitted = fit_into_tile(image)
    left, top = (TILE - fitted.width) // 2, (TILE - fitted.height) // 2
    tile = Image.new("RGB", (TILE, TILE), TILE_BACKGROUND)
    tile.paste(fitted, (left, top))
    return tile, lambda x, y: (left + x * (fitted.width - 1), top + y * (fitted.height - 1))


def draw_png(title: str, note: str, rows: list[list[Tile]]) -> Image.Image:
    """Draw all rows on one sheet, each column below its heading."""
    width = GAP + len(rows[0]) * (TILE + GAP)
    sheet = Image.new("RGB", (width, HEADER + len(rows) * (TILE + CAPTION + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((GAP, 8), title, fill=INK, font=ImageFont.load_default(16))
    draw.text((GAP, 29), note, fill=FAINT, font=font)
    for column, tile in enumerate(rows[0]):
        color = {"query": QUERY, "key": KEY}.get(tile.branch, FAINT)
        draw.text((GAP + column * (TILE + GAP), 50), tile.column, fill=color, font=font)
    for row, tiles in enumerate(rows):
        top = HEADER + row * (TILE + CAPTION + GAP)
        for column, tile in enumerate(tiles):
            left = GAP + column * (TILE + GAP)
            sheet.paste(tile.picture, (left, top))
            draw.text((left, top + TILE + 3), tile.caption, fill=INK, font=font)
    return sheet


def render_html(title: str, note: str, rows: list[list[Tile]]) -> str:
    """Return the sheet as HTML with embedded pictures, which wrap at the width of the window."""
    sections = []
    for tiles in rows:
        figures = [
            f'<figure class="{tile.branch}"><img alt="{html.escape(tile.column)}" '
            f'src="data:image/png;base64,{encode_png(tile.picture)}">'
            f"<figcaption><b>{html.escape(tile.column)}</b><br>{html.escape(tile.caption)}"
            "</figcaption></figure>"
            for tile in tiles
        ]
        sections.append("<section>\n" + "\n".join(figures) + "\n</section>")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(note)}</p>\n"
        + "\n".join(sections)
        + "\n</html>\n"
    )


def encode_png(picture: Image.Image) -> str:
    """Return an image as a base64-encoded PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
