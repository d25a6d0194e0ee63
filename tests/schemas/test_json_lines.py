"""Files of JSON lines that a job appends to, and that are read while it runs."""

from pathlib import Path

import pytest

from schemas.json_lines import append_json_line, read_json_lines


def test_what_is_appended_is_read_in_order(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 0.1 + 0.2}, {"text": "two\nlines, é"}, {}]
    for row in rows:
        append_json_line(tmp_path / "rows.jsonl", row)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for unfinished in (b'{"st', b'{"step": 2', b"{", b"", b'{"\xc3', b"\0\0"):
        path.write_bytes('{"é": 1}\n'.encode() + unfinished)
        assert read_json_lines(path) == [{"é": 1}]
        append_json_line(path, {"step": 3})
        assert read_json_lines(path) == [{"é": 1}, {"step": 3}]


def test_a_last_line_without_a_line_break_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    append_json_line(path, {"step": 3})
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_json_lines(path)
    path.write_text('[1]\n{"step": 2}\n')
    with pytest.raises(ValueError, match="not a JSON object"):
        read_json_lines(path)


@pytest.mark.parametrize("damaged", [b'{"st', b"", b"\0\0\0\0", b'{"step\xff": 1}', b"[1]", b"1"])
def test_damage_in_the_middle_is_skipped_if_the_reader_says_so(
    tmp_path: Path, damaged: bytes
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 2}\n{"st')
    assert read_json_lines(path, skip_damaged=True) == [{"step": 1}, {"step": 2}]
