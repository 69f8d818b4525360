"""Pictures of synthetic images as data URIs for the page, limited in number and size."""

import base64
import io
from collections.abc import Iterable

from PIL import Image, UnidentifiedImageError

from dfkd_ray.storage import Folder

NUM_PICTURES = 12
FILE_BYTES = 160_000  # a larger file is made smaller
TOTAL_BYTES = 1_500_000
WIDTH, HEIGHT = 900, 1600  # pixels
NUM_PIXELS = 50_000_000  # more is not opened


def data_uris(folder: Folder, names: Iterable[str]) -> dict[str, str]:
    """The PNG files of these names as data URIs, in order, as many as fit; invalid pictures are left out.

    A file of more than 160 kB is scaled down to 900 pixels across and stored as JPEG.
    """
    uris: dict[str, str] = {}
    room = TOTAL_BYTES
    for name in names:
        if len(uris) == NUM_PICTURES:
            break
        data = folder.read(name)
        kind, data = smaller(data) if data is not None else ("", b"")
        if data and len(data) <= room:
            uris[name] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            room -= len(data)
    return uris


def smaller(data: bytes) -> tuple[str, bytes]:
    """Format and bytes of a picture, scaled down if its file is large; empty if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.format != "PNG" or picture.width * picture.height > NUM_PIXELS:
                return "", b""
            picture.load()
            if len(data) <= FILE_BYTES:
                return "png", data
            picture.thumbnail((WIDTH, HEIGHT))
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "JPEG", quality=80)
            return "jpeg", buffer.getvalue()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "", b""
