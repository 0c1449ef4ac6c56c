"""Data files: what is read, what is left out and named, what is refused."""

from __future__ import annotations

import gzip
import json
import lzma
import zipfile

import pytest

from hfpatch.errors import DataMissingError
from hfpatch.evals.rows import find, read_rows, skipped

LINES = ['{"a": 1, "b": "é\\u2028x"}', "", '{"a": 2, "b": ""}']
ROWS = [{"a": 1, "b": "é\u2028x"}, {"a": 2, "b": ""}]


def written(path, text):
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(text.encode()))
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.xz"])
def test_json_lines_plain_and_compressed(tmp_path, name):
    path = written(tmp_path / name, "\r\n".join(LINES))
    for given in (path, str(path)):
        found = read_rows(given, ["a", "b"])
        assert (found.rows, found.problems, found.places) == (ROWS, [], [0, 2])
    assert find(tmp_path, "x") == path
    assert find(tmp_path, "y") is None


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_json_list(tmp_path, name):
    found = read_rows(written(tmp_path / name, json.dumps([*ROWS, 3, {"a": 1}])), ["b"])
    assert found.rows == ROWS and found.places == [0, 1]
    assert found.problems == [f"{name}[2] is no JSON object", f"{name}[3] lacks b"]


def test_file_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as packed:
        packed.writestr("data/x.jsonl", "\n".join(LINES))
        packed.writestr("data/y.jsonl.xz", lzma.compress(b'{"a": 1}\n[]'))
    folder = zipfile.Path(tmp_path / "d.zip", "data/")
    assert read_rows(find(folder, "x"), ["a"]).rows == ROWS
    assert read_rows(find(folder, "y")).problems == ["y.jsonl.xz:2 is no JSON object"]
    with pytest.raises(DataMissingError, match="no data file"):
        read_rows(folder / "z.jsonl")


def test_a_bad_row_is_named_by_line_and_the_rest_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    good = b'{"a": 1, "b": 2}'
    lines = [
        good,
        b"{",
        b"[1]",
        b'{"a": 1}',
        b'{"b": 2, "a": null}',
        b'"\xff"',
        b'{"a": 9, "b": 2}',
        b"[" * 10**5,
        good,
    ]
    path.write_bytes(b"\n".join(lines))
    found = read_rows(path, ["a", "b"], lambda row: "has a nine" if row["a"] == 9 else None)
    assert found.rows == [{"a": 1, "b": 2}] * 2 and found.places == [0, 8]
    said = [problem.split(" (")[0] for problem in found.problems]
    assert said == [
        "x.jsonl:2 is no JSON",
        "x.jsonl:3 is no JSON object",
        "x.jsonl:4 lacks b",
        "x.jsonl:5 lacks a",
        "x.jsonl:6 is no JSON",
        "x.jsonl:7 has a nine",
        "x.jsonl:8 is no JSON",
    ]


def test_files_that_are_no_use(tmp_path):
    with pytest.raises(DataMissingError, match=r"no data file .*none.jsonl.*\.jsonl\.gz.*with the keys a, b"):
        read_rows(tmp_path / "none.jsonl", ["a", "b"])
    with pytest.raises(DataMissingError, match="no data file"):
        read_rows(tmp_path)
    for name, content in [
        ("no.jsonl.gz", b"{}"),
        ("no.jsonl.xz", b"{}"),
        ("half.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-20]),
        ("half.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 999)[:-20]),
        ("no.json", b"[{"),
        ("no8.json", b'["\xff"]'),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataMissingError, match=f"cannot read data file .*{name}"):
            read_rows(tmp_path / name)
    with pytest.raises(DataMissingError, match="no row that can be used: it is empty"):
        read_rows(written(tmp_path / "empty.jsonl", "\n \n"))
    with pytest.raises(DataMissingError, match=r"no row .*: bad.jsonl:1 lacks b. Expected: rows with the keys b"):
        read_rows(written(tmp_path / "bad.jsonl", '{"a": 1}'), ["b"])


def test_what_was_left_out_in_a_sentence():
    assert skipped(["a:1 lacks x"]) == "1 malformed row skipped: a:1 lacks x"
    assert skipped(list("abc"), most=2) == "3 malformed rows skipped: a, b, and 1 more"
