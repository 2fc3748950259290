from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavflow.base.errors import InputError
from wavflow.data.manifest import read_manifest, write_csv, write_report


def write(path, text: str, encoding: str = "utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_a_training_manifest(tmp_path):
    path = write(
        tmp_path / "train.csv",
        "id,audio_path,features_path,video_exist,text_exist\r\n"
        "001,a/1.wav,f/1.pth,1,0\r\n"
        "\r\n"
        "1,/abs/2.wav,f/2.pth,0, 1 \r\n",
        "utf-8-sig",
    )
    rows = read_manifest(path, required=("id", "audio_path", "features_path", "video_exist"))
    assert [row.id for row in rows] == ["001", "1"] and rows.errors == []
    assert [row.number for row in rows] == [2, 4]
    assert rows[0].audio_path == tmp_path / "a/1.wav"
    assert str(rows[1].audio_path) == "/abs/2.wav"
    assert (rows[0].video_exist, rows[0].text_exist) == (True, False)
    assert (rows[1].video_exist, rows[1].text_exist) == (False, True)
    assert rows[0].fields["features_path"] == "f/1.pth" and rows[0].video_path is None
    rooted = read_manifest(path, data_root=tmp_path / "root")
    assert rooted[0].features_path == tmp_path / "root" / "f/1.pth"


def test_an_inference_manifest_and_its_default_ids(tmp_path):
    path = write(
        tmp_path / "x.csv",
        "video_path,caption,video_exist,text_exist\n"
        'clips/dog.mp4,"a dog, barking",1,1\n'
        ",only words,0,1\n"
        "clips/cat.mp4,,1,1\n"
        "clips/ignored.mp4,said,0,0\n",
    )
    rows = read_manifest(path, required=("video_path", "caption"))
    assert [row.id for row in rows] == ["dog", "row_00001", "cat", "ignored"]
    assert rows[0].caption == "a dog, barking" and rows[0].video_path == tmp_path / "clips/dog.mp4"
    assert [row.video_exist for row in rows] == [True, False, True, False]
    assert [row.text_exist for row in rows] == [True, True, False, False]


def test_flags_may_be_left_out(tmp_path):
    path = write(tmp_path / "x.csv", "id,video_path,caption\na,v.mp4,\nb,,words\n")
    rows = read_manifest(path)
    assert [(row.video_exist, row.text_exist) for row in rows] == [(True, False), (False, True)]


def test_relative_paths_may_start_at_the_working_folder(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "wavflow")
    (tmp_path / "samples/f").mkdir(parents=True)
    (tmp_path / "samples/f/1.pth").touch()
    (tmp_path / "samples/2.wav").touch()
    text = "id,audio_path,features_path\na,/abs/1.wav,\nb,2.wav,samples/f/1.pth\n"
    path = write(tmp_path / "samples/train.csv", text)
    monkeypatch.chdir(tmp_path)
    first, second = read_manifest("samples/train.csv")
    assert str(first.audio_path) == "/abs/1.wav" and first.features_path is None
    assert str(second.features_path) == "samples/f/1.pth"
    assert str(second.audio_path) == "samples/2.wav"  # beside the table
    assert caplog.messages == [
        "samples/train.csv: relative paths of features_path start at the working folder"
    ]
    # What both lead to, or neither, is beside the table; a root that is given counts alone.
    (tmp_path / "samples/samples/f").mkdir(parents=True)
    (tmp_path / "samples/samples/f/1.pth").touch()
    assert read_manifest(path)[1].features_path == tmp_path / "samples/samples/f/1.pth"
    assert read_manifest(path, data_root="r")[1].features_path.parts[0] == "r"


def test_rows_that_cannot_be_used_are_collected(tmp_path):
    path = write(
        tmp_path / "x.csv",
        "id,audio_path,video_path,caption,video_exist,text_exist\n"
        "good,a.wav,v.mp4,c,1,1\n"
        "flag,a.wav,v.mp4,c,yes,1\n"
        "flag2,a.wav,v.mp4,c,1,\n"
        "good,b.wav,v.mp4,c,1,1\n"
        "../x,a.wav,v.mp4,c,1,1\n"
        "a/b,a.wav,v.mp4,c,1,1\n"
        ",a.wav,v.mp4,c,1,1\n"
        "noaudio,,v.mp4,c,1,1\n"
        "novideo,a.wav,,c,1,1\n"
        "textonly,a.wav,,c,0,1\n"
        "cells,a.wav\n",
    )
    rows = read_manifest(path, required=("id", "audio_path", "video_path"))
    assert [row.id for row in rows] == ["good", "textonly"]
    found = [(error.row_number, error.field, error.value) for error in rows.errors]
    assert found == [
        (3, "video_exist", "yes"),
        (4, "text_exist", ""),
        (5, "id", "good"),
        (6, "id", "../x"),
        (7, "id", "a/b"),
        (8, "id", ""),
        (9, "audio_path", ""),
        (10, "video_path", ""),
        (12, "row", "cells,a.wav"),
    ]
    assert str(rows.errors[0]) == "row 3, video_exist 'yes': wanted 0 or 1"
    assert rows.errors[2].reason == "already the id of row 2"
    assert [error.id for error in rows.errors][:2] == ["flag", "flag2"]


def test_files_that_cannot_be_used(tmp_path):
    for text, reason in [
        ("", "empty, wanted a header"),
        ("id,audio_path\n", "a header and no rows"),
        ("id,id\n1,2\n", "column 'id' is there 2 times"),
        ("id,caption\n1,x\n", "no column 'audio_path', found id, caption"),
        ('id,"audio_path\n1,x\n', "row 1: not valid CSV"),
        ("id;audio_path\n1;x\n", "columns are separated by semicolons; wanted commas"),
        ("id\taudio_path\n1\tx\n", "columns are separated by tabs; wanted commas"),
    ]:
        path = write(tmp_path / "x.csv", text)
        with pytest.raises(InputError, match=reason) as caught:
            read_manifest(path, required=("id", "audio_path"))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="UTF-16 text; wanted UTF-8"):
        read_manifest(write(tmp_path / "x.csv", "id\n1\n", "utf-16"))
    with pytest.raises(InputError, match="row 1: not UTF-8"):
        read_manifest(write(tmp_path / "x.csv", "id,é\n1,2\n", "latin-1"))
    with pytest.raises(InputError, match="no such file"):
        read_manifest(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_manifest(tmp_path)


def test_a_bad_row_costs_that_row_alone(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(
        b"\xef\xbb\xbfid,caption\r\n"
        b"a,a bell\r\n"
        b'b,"a "big" bell"\r\n'
        b"c,caf\xe9\r\n"
        b'd,"never closed\r\n'
        b"e,caf\xc3\xa9\r\n"
        b'f,"two\r\nlines"\r\n'
        b'g,a 3" pipe\r\n'
        b'h,"open to the end\r\n'
    )
    rows = read_manifest(path)
    assert [(row.id, row.number) for row in rows] == [("a", 2), ("e", 6), ("f", 7), ("g", 8)]
    assert [row.caption for row in rows] == ["a bell", "café", "two\r\nlines", 'a 3" pipe']
    assert [error.row_number for error in rows.errors] == [3, 4, 5, 9]
    said = [str(error) for error in rows.errors]
    assert said[0].startswith("row 3, row ") and "not valid CSV" in said[0]
    assert said[1] == r"row 4, caption 'caf\\xe9': not UTF-8 text"
    assert "never closed" in said[2] and "open to the end" in said[3]


def test_what_spreadsheets_and_data_frames_add(tmp_path):
    path = write(
        tmp_path / "x.csv",
        ",id,caption,text_exist,,\n0,a,a bell,True,,\n1,b,rain,0.0,,\n2,c,hail,1.0,,,,\n",
    )
    rows = read_manifest(path, required=("id",))
    assert rows.columns == ("id", "caption", "text_exist") and not rows.errors
    assert [(row.id, row.text_exist) for row in rows] == [("a", True), ("b", False), ("c", True)]


cells = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)


@given(st.lists(cells, min_size=1, max_size=8))
def test_captions_survive_writing_and_reading(tmp_path_factory, captions):
    path = tmp_path_factory.getbasetemp() / "captions.csv"
    rows = [{"id": f"{i:03d}", "caption": c, "text_exist": True} for i, c in enumerate(captions)]
    write_csv(path, rows, ("id", "caption", "video_exist", "text_exist"))
    with open(path, encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["caption"] for row in table] == captions
    assert table[0]["video_exist"] == "" and table[0]["text_exist"] == "1"


def test_write_csv_refuses_unknown_columns_and_keeps_the_old_file(tmp_path):
    write_csv(tmp_path / "x.csv", [{"id": "a"}], ("id",))
    with pytest.raises(ValueError, match="other"):
        write_csv(tmp_path / "x.csv", [{"id": "b", "other": 1}], ("id",))
    assert (tmp_path / "x.csv").read_text() == "id\na\n"


def test_reports(tmp_path):
    write_report(tmp_path / "report.csv", [("a", "ok", ""), ("b", "skipped", "two\nlines")])
    text = (tmp_path / "report.csv").read_text()
    assert text == "id,status,reason\na,ok,\nb,skipped,two lines\n"
    with pytest.raises(ValueError, match="'fine'"):
        write_report(tmp_path / "report.csv", [("a", "fine", "")])
