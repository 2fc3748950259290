from __future__ import annotations

import json

import pytest

from bench import length


def test_growth_is_the_slope_of_the_logarithms():
    rows = [{"seconds": s, "took": 0.3 * s**1.7} for s in (2, 8, 30, 60)]
    rows[0]["took"] = 5.0  # what is loaded once is no growth
    assert length.growth(rows) == pytest.approx(1.7)
    assert length.growth(rows[:2]) is None


def test_lengths_that_would_take_too_long_are_left_out(monkeypatch):
    class Fresh:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, job):
            self.job = job
            return self

        def result(self):
            return {"seconds": self.job.seconds, "took": self.job.seconds**2 / 100}

    monkeypatch.setattr(length, "ProcessPoolExecutor", Fresh)
    options = {"device": "cpu", "dtype": "float32", "steps": 1, "batch": 1, "threads": 1}
    rows = length.measure("small_16k", "native", [10, 20, 40, 80, 160], 20.0, options)
    assert [row["seconds"] for row in rows] == [10, 20, 40]  # 80 would take 64 s


def test_every_way_is_timed_in_a_process_of_its_own(tmp_path, capsys):
    length.main(
        models="small_16k",
        ways="native,sliding,windowed,streamed",
        lengths="12",
        device="cpu",
        dtype="float32",
        steps=1,
        batch=2,
        limit=100.0,
        json_path=tmp_path / "x.json",
        plot=tmp_path / "x.png",
    )
    found = json.loads((tmp_path / "x.json").read_text())
    assert [result["way"] for result in found["results"]] == list(length.WAYS)
    for result in found["results"]:
        for row in result["rows"]:
            assert row["took"] > 0 and row["peak_bytes"] > 1e8
            assert ("first_sound" in row) == (result["way"] == "streamed")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert "small_16k, streamed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "huge"}, "--models has 'huge'"),
        ({"ways": "native,fast"}, "--ways has 'fast'"),
        ({"lengths": "8,x"}, "--lengths is '8,x'"),
        ({"device": "tpu"}, "--device tpu cannot be used"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    given = {"models": "small_16k", "ways": "native", "lengths": "8", "device": "cpu"} | options
    with pytest.raises(SystemExit):
        length.main(**given, dtype="float32", steps=1, batch=1, limit=1.0)
    assert message in capsys.readouterr().err
