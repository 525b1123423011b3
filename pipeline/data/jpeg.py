"""What a JPEG says of itself before it is decoded (ITU-T T.81, annex B; Exif 2.32)."""

import re
from typing import Literal, NamedTuple

from pipeline.errors import ImageError


class JpegHeader(NamedTuple):
    """Pixels as stored, colour components, the EXIF orientation (1 to 8; 1 where there is none), and whether three
    components are red, green and blue, not YCbCr, by Adobe's marker or by their names.
    """

    width: int
    height: int
    num_components: int
    orientation: int
    is_rgb: bool


_MARKER = re.compile(rb"\xff+([^\xff\0])")  # libjpeg, too, passes over fill bytes and garbage before a marker
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_SEGMENT = frozenset(range(0xD0, 0xD8)) | {0x01}
_END, _SCAN, _APP1, _APP14 = 0xD9, 0xDA, 0xE1, 0xEE
_ORIENTATION = 0x0112


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Walk the segments up to the first scan, and make sure that an end marker follows it.

    Raises ImageError `truncated` or `corrupt`.
    """
    frame, orientation, adobe, position = None, 1, b"", 2
    while True:
        marker_match = _MARKER.search(data, position)
        if not marker_match:
            raise ImageError("decode", "truncated", "the JPEG ends before its first scan")
        marker, position = marker_match[1][0], marker_match.end()
        if marker in _WITHOUT_SEGMENT:
            continue
        if marker in (_SCAN, _END):
            break
        end = position + int.from_bytes(data[position : position + 2])
        if end > len(data) or position + 2 > len(data):
            raise ImageError("decode", "truncated", "the JPEG ends before its first scan")
        if marker in _FRAMES and frame is None:
            frame = data[position + 2 : end]
        elif marker == _APP1 and data.startswith(b"Exif\0\0", position + 2):
            orientation = _exif_orientation(data[position + 8 : end])
        elif marker == _APP14 and data.startswith(b"Adobe", position + 2):
            adobe = data[position + 2 : end]
        position = end
    if frame is None or len(frame) < 6:
        raise ImageError("decode", "corrupt", "the JPEG has no frame header before its first scan")
    if data.rfind(b"\xff\xd9", position) < 0:
        raise ImageError("decode", "truncated", "the JPEG has no end marker")
    is_rgb = frame[5] == 3 and (adobe[11:12] == b"\0" if adobe else frame[6::3] == b"RGB")
    return JpegHeader(int.from_bytes(frame[3:5]), int.from_bytes(frame[1:3]), frame[5], orientation, is_rgb)


def _exif_orientation(tiff: bytes) -> int:
    """The orientation among the first directory's entries (TIFF 6.0, section 2), or 1."""
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], order)

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * min(number(directory, 2), 1000), 12):
        if number(entry, 2) == _ORIENTATION:
            return number(entry + 8, 2 if number(entry + 2, 2) == 3 else 4)  # SHORT, or else LONG
    return 1
