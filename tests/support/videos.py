"""Small videos whose frames say which they are."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

SIDE = 64  # 8 stripes of 8 pixels spell a frame's number in black and white


def picture(number: int) -> np.ndarray:
    bits = [(number >> i) & 1 for i in range(8)]
    return np.repeat(np.tile(np.repeat(bits, 8), (SIDE, 1))[..., None], 3, 2).astype(np.uint8) * 255


def make_video(
    path: Path, count: int, fps: Fraction | int, pts: list[int] | None = None, **options
) -> Path:
    """A video whose frames spell their numbers."""
    options = {"preset": "ultrafast", "crf": "28"} | options
    return write_video(path, [picture(i) for i in range(count)], fps, pts, **options)


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray],
    fps: Fraction | int,
    pts: list[int] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    **options: str,
) -> Path:
    """`pts` are in milliseconds and replace the constant rate."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = options
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, each in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(each, format="rgb24").reformat(format=pix_fmt)
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
