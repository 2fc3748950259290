"""Values of options that are none, and sounds that end before what they are of."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import tiny_sampler

from wavflow.base.errors import InputError
from wavflow.pipeline.request import Settings


@pytest.fixture(scope="module")
def sampler():
    return tiny_sampler()


@pytest.mark.parametrize("seed", [-1, 2**63, 99999999999999999999, 1.5, math.nan])
def test_seeds(sampler, seed) -> None:
    with pytest.raises(InputError, match=r"seed is .*; wanted a whole number from 0 to 2\^63 - 1"):
        sampler("a bell", seed=seed, steps=1)
    with pytest.raises(InputError, match="row 1: seed is"):
        sampler.generate(["a bell", "rain"], seeds=[0, seed], steps=1)


def test_the_largest_seed(sampler) -> None:
    assert sampler("a bell", seed=2**63 - 1, steps=1, seconds=1).audio.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["guidance", "guidance_rescale", "window", "overlap"])
def test_numbers_that_are_none(sampler, name, value) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}; wanted"):
        sampler("a bell", steps=1, **{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.0])
def test_loudness(sampler, value) -> None:
    with pytest.raises(InputError, match="loudness is .*; wanted LUFS"):
        sampler("a bell", steps=1, loudness=value)


def test_settings_as_keyword_arguments() -> None:
    settings = Settings(steps=3, window=1.0)
    assert Settings(**settings.options()) == settings


@pytest.mark.parametrize("caption", [None, "", "  "])
def test_nothing_to_generate_from(sampler, caption) -> None:
    with pytest.raises(InputError, match="nothing to generate: give a caption, a video or both"):
        sampler(caption)


def write_film(path: Path, seconds: int) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        for number in range(25 * seconds):
            picture = np.full((64, 64, 3), number % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(stream.encode(None))
    return path


def test_a_film_that_is_longer_than_its_sound_is_told(sampler, tmp_path, caplog) -> None:
    film = write_film(tmp_path / "film.mp4", 3)
    sampler(video=film, steps=1, seconds=2)
    assert "film.mp4: the video has 3.00 s, its first 2 s get sound" in caplog.text
    caplog.clear()
    sampler(video=film, steps=1, seconds=3)
    assert "film.mp4" not in caplog.text


def test_a_recording_that_is_cut_is_told(sampler, caplog) -> None:
    wave = 0.1 * torch.ones(2 * sampler.sample_rate)
    sampler.complete(wave, "a bell", seconds=1.5, gap=(0.5, 1.0), steps=1)
    assert "the recording has 2 s: its first 1.5 s are kept" in caplog.text
