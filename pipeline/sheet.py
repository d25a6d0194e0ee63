"""Rows of captioned pictures as one PNG and as one HTML page that needs no other file."""

import base64
import html
import io
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

TILE = 224
GAP = 12
CAPTION = 22
HEADER = 76
PAPER, INK, FAINT = (250, 250, 248), (30, 30, 30), (120, 120, 120)
QUERY, KEY = (0, 114, 178), (213, 94, 0)  # told apart by the colour-blind as well (Okabe and Ito)

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
    """One picture, TILE pixels square: what it is (its column), its caption, and its branch."""

    column: str
    picture: Image.Image
    caption: str
    branch: str = ""


def fit_into_tile(image: Image.Image) -> Image.Image:
    """The image resized so that its longer side is a tile's; the other is at least one pixel."""
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def png(title: str, note: str, rows: list[list[Tile]]) -> Image.Image:
    """All rows on one sheet, each column under its name."""
    width = GAP + len(rows[0]) * (TILE + GAP)
    sheet = Image.new("RGB", (width, HEADER + len(rows) * (TILE + CAPTION + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 8), title, fill=INK, font=font(16))
    draw.text((GAP, 29), note, fill=FAINT, font=font(13))
    for column, tile in enumerate(rows[0]):
        colour = {"query": QUERY, "key": KEY}.get(tile.branch, FAINT)
        draw.text((GAP + column * (TILE + GAP), 50), tile.column, fill=colour, font=font(13))
    for row, tiles in enumerate(rows):
        top = HEADER + row * (TILE + CAPTION + GAP)
        for column, tile in enumerate(tiles):
            left = GAP + column * (TILE + GAP)
            sheet.paste(tile.picture, (left, top))
            draw.text((left, top + TILE + 3), tile.caption, fill=INK, font=font(13))
    return sheet


def page(title: str, note: str, rows: list[list[Tile]]) -> str:
    """The same as HTML, every picture inside it; as many in a line as the window has room for."""
    sections = []
    for tiles in rows:
        figures = [
            f'<figure class="{tile.branch}"><img alt="{html.escape(tile.column)}" '
            f'src="data:image/png;base64,{encoded(tile.picture)}">'
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


def encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
