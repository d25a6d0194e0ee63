"""Recognize formats that no decoder here reads, so that a reject can name the format."""

import struct

SIGNATURES = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"II\xbc", "JPEG XR"),
    (b"BPG\xfb", "BPG"),
    (b"FLIF", "FLIF"),
    (b"FUJIFILMCCD-RAW", "Fujifilm raw"),
    (b"FOVb", "Sigma raw"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"gimp xcf", "GIMP XCF"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
)
BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC"),
    **dict.fromkeys((b"mif1", b"msf1", b"miaf", b"mif2"), "HEIF"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    b"crx ": "Canon raw (CR3)",
    b"jxl ": "JPEG XL",
}
"""Format names by the major brand of an ISO base media file (ISO/IEC 14496-12)."""

FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
JPEG_LS = 0xF7
STANDALONE = {0x01, *range(0xD0, 0xD9)}
"""JPEG markers without a length field (ITU-T T.81, table B.1); FRAME_HEADERS are those that begin a
frame."""


def name_format(content: bytes) -> str:
    """Return the name of a known format that cannot be read; "" for any other content."""
    if content[:3] == b"\xff\xd8\xff":
        return name_jpeg(content)
    if content[4:8] == b"ftyp":
        return BRANDS.get(content[8:12], "a video or another ISO media file")
    for signature, name in SIGNATURES:
        if content.startswith(signature):
            return name
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<svg", b"<?xml")):
        return "SVG" if b"<svg" in content[:4096].lower() else "XML"
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    return ""


def name_jpeg(content: bytes) -> str:
    """Name a kind of JPEG that cannot be read: 12-bit, lossless or JPEG-LS; "" for any other."""
    position = 2
    while position + 4 <= len(content):
        if content[position] != 0xFF:
            return ""
        marker = content[position + 1]
        if marker == 0xFF or marker in STANDALONE:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == JPEG_LS:
            return "JPEG-LS"
        if marker in FRAME_HEADERS:
            bits = content[position + 4] if position + 4 < len(content) else 8
            kind = "lossless JPEG" if marker in LOSSLESS else "JPEG"
            return f"{bits}-bit {kind}" if bits != 8 or marker in LOSSLESS else ""
        position += 2 + struct.unpack_from(">H", content, position + 2)[0]
    return ""
