"""Pictures of patches, to print in their true size and to read again."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchproof.errors import PatchproofError
from patchproof.models.weights import write_atomically

_CM_PER_INCH = 2.54
_PRINTED = 1200
"""Least pixels of the longer side of a picture: none of the patch's shows a soft edge in print."""
_KEY = "patchproof:pixels"
"""Text in a PNG: height and width of the patch, which its picture shows larger."""


def write_picture(path: Path, pixels: NDArray[np.uint8], width_cm: float) -> None:
    """Write pixels as sharp squares to a PNG or a PDF, ``width_cm`` wide in print.

    Args:
        path: ``.png`` or ``.pdf``.
        pixels: (h, w, 2) grey and opacity, or (h, w, 4) colours and opacity.
        width_cm: of the print.

    Raises:
        PatchproofError: another ending, or a width that is not above 0.
        RunError: the file cannot be written.
    """
    if path.suffix.lower() not in (".png", ".pdf"):
        raise PatchproofError(f"patch image: expected a .png or .pdf file, got {path}")
    if not 0.0 < width_cm < math.inf:
        raise PatchproofError(f"width of the print: expected cm above 0, got {width_cm!r}")
    height, width = pixels.shape[:2]
    each = math.ceil(_PRINTED / max(height, width))
    picture = pixels.repeat(each, 0).repeat(each, 1)
    if path.suffix.lower() == ".png":
        data = _png(picture, (height, width), width_cm)
    else:
        data = _pdf(picture, width_cm)
    write_atomically(path, data)


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Return the pixels of a picture, (h, w, 2) or (h, w, 4), as ``write_picture`` got them.

    Raises:
        PatchproofError: no such file, or not a picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.load()
            grey = picture.mode in ("1", "L", "LA")
            pixels: NDArray[np.uint8] = np.asarray(picture.convert("LA" if grey else "RGBA"))
            said = str(picture.info.get(_KEY, ""))
    except (OSError, UnidentifiedImageError) as error:
        raise PatchproofError(f"patch image: expected a picture, got {path}: {error}") from error
    patch = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", said)
    if patch is None:
        return pixels.copy()
    rows, columns = (
        (np.arange(count) + 0.5) * length // count
        for count, length in zip(map(int, patch.groups()), pixels.shape[:2], strict=True)
    )
    shown: NDArray[np.uint8] = pixels[rows.astype(int)[:, None], columns.astype(int)]
    return shown


def _png(picture: NDArray[np.uint8], patch: tuple[int, int], width_cm: float) -> bytes:
    """Return a PNG that says its size in print, and in pixels of the patch."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(_KEY, f"{patch[0]}x{patch[1]}")
    per_inch = picture.shape[1] / width_cm * _CM_PER_INCH
    buffer = io.BytesIO()
    Image.fromarray(picture, "LA" if picture.shape[2] == 2 else "RGBA").save(
        buffer, "PNG", dpi=(per_inch, per_inch), pnginfo=text
    )
    return buffer.getvalue()


def _pdf(picture: NDArray[np.uint8], width_cm: float) -> bytes:
    """Return a PDF with one page, filled by the picture."""
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure

    if picture.shape[2] == 2:
        picture = picture[..., [0, 0, 0, 1]]
    width = width_cm / _CM_PER_INCH
    figure = Figure(figsize=(width, width * picture.shape[0] / picture.shape[1]))
    FigureCanvasPdf(figure)
    figure.patch.set_alpha(0.0)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), frameon=False)
    axes.set_axis_off()
    axes.imshow(picture, interpolation="none", aspect="auto")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    return buffer.getvalue()
