from __future__ import annotations

from pathlib import Path

import pytest

from localsgd_ext.train.files import append_json_line, read_json, read_json_lines, write_json, write_json_lines


def test_json_lines_survive_a_cut_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    for epoch in (1, 2):
        append_json_line(path, {"epoch": epoch})
    with path.open("a") as file:
        file.write('{"epoch": 3, "los')
    assert read_json_lines(path) == [{"epoch": 1}, {"epoch": 2}]
    write_json_lines(path, read_json_lines(path))
    append_json_line(path, {"epoch": 3})
    assert [line["epoch"] for line in read_json_lines(path)] == [1, 2, 3]


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is not valid JSON"):
        read_json_lines(path)


def test_a_line_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 1}\n{"epo\xe3h": 2}\n{"epoch": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is not valid JSON: 'utf-8' codec can't decode"):
        read_json_lines(path)
    path.write_bytes(b'{"epoch": 1}\n{"epo\xe3')  # cut short as well
    assert read_json_lines(path) == [{"epoch": 1}]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"a": [1, None]})
    assert read_json(path) == {"a": [1, None]}
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        read_json(path)
