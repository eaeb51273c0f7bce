"""The endings of picture files."""

from __future__ import annotations

from typing import Final

_OF_PILLOW: Final = """
    apng avif avifs blp bmp bufr bw cur dcx dds dib emf eps fit fits flc fli ftc ftu gbr gif grib h5 hdf icb
    icns ico iim im j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpeg mpg mpo msp palm pbm pcd pcx pdf pfm pgm png
    pnm ppm ps psd pxr qoi ras rgb rgba sgi tga tif tiff vda vst webp wmf xbm xpm
"""
_OTHERS: Final = """
    ai arw bpg cr2 cr3 dng exr hdr heic heics heif heifs hif jng jls jpm jxl jxr mng nef orf pam pct pict raf
    raw rw2 svg svgz wdp xcf
"""
IMAGE_SUFFIXES: Final = tuple(f".{ending}" for ending in (*_OF_PILLOW.split(), *_OTHERS.split()))
"""Lower case: all that Pillow has a name for, and others; few of them can be decoded."""
