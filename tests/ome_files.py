"""An OME-TIFF in many files, as Micro-Manager writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_ome_set(folder: Path, pixels: np.ndarray) -> None:
    """The planes T x C of ``pixels`` [T, C, Y, X], uint16, in a file each; a pixel is 0.65 µm wide."""
    import tifffile

    places = list(np.ndindex(pixels.shape[:2]))
    names = [f"img_channel{c:03}_time{t:03}.tif" for t, c in places]
    data = "".join(
        f'<TiffData FirstT="{t}" FirstC="{c}" FirstZ="0" IFD="0" PlaneCount="1">'
        f'<UUID FileName="{name}">urn:uuid:{k}</UUID></TiffData>'
        for k, ((t, c), name) in enumerate(zip(places, names, strict=True))
    )
    sizes = " ".join(f'Size{axis}="{size}"' for axis, size in zip("TCYX", pixels.shape, strict=True))
    for k, (place, name) in enumerate(zip(places, names, strict=True)):
        ome = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{k}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeZ="1" '
            f'PhysicalSizeX="0.65" {sizes}>{data}</Pixels></Image></OME>'
        )
        tifffile.imwrite(folder / name, pixels[place], description=ome.encode(), metadata=None)
