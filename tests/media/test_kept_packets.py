"""A copy of a part keeps what its pictures are decoded from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.videos import make_video

from wavflow.media.mux import mux


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("seconds", [1.0, 1.96, 2.2])
def test_every_picture_of_the_part_is_there_and_the_same(tmp_path, suffix, seconds):
    """B-pictures: the first packets of Matroska have no time of decoding."""
    import av

    options = {"preset": "medium", "bf": "4", "g": "250"}
    source = make_video(tmp_path / "x.mkv", 75, 25, **options)
    with av.open(str(source)) as whole:
        packet = next(whole.demux(video=0))
        assert packet.dts is None and packet.is_keyframe
    mux(source, torch.zeros(round(8000 * seconds)), 8000, tmp_path / f"out{suffix}")
    waves = []
    for path in (source, tmp_path / f"out{suffix}"):
        with av.open(str(path)) as container:
            waves.append([f.to_ndarray(format="gray") for f in container.decode(video=0)])
    wanted = round(25 * seconds)
    # An edit list hides what is kept for others alone; Matroska has none.
    assert wanted <= len(waves[1]) <= wanted + (4 if suffix == ".mkv" else 0)
    for i in range(wanted):
        np.testing.assert_array_equal(waves[0][i], waves[1][i])
