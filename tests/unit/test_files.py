"""Files and folders that appear whole or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from station import files
from station.errors import SettingError


def test_a_file_is_replaced_only_when_its_bytes_differ(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    assert files.replace_file(file, [b"one ", b"two"]) is True
    inode = file.stat().st_ino
    assert files.replace_file(file, [b"one two"]) is False
    assert file.stat().st_ino == inode
    assert files.replace_file(file, [b"one twO"]) is True
    assert file.read_bytes() == b"one twO"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_a_file_whose_content_breaks_off_keeps_what_it_had(tmp_path: Path) -> None:
    def breaks_off() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError

    file = tmp_path / "manifest.json"
    file.write_bytes(b"whole")
    with pytest.raises(RuntimeError):
        files.replace_file(file, breaks_off())
    assert file.read_bytes() == b"whole"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_a_folder_replaces_lies_where_the_new_one_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda _left, _right: False)
    for name in ("new", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    files.put_folder(tmp_path / "new", tmp_path / "place")
    assert (tmp_path / "place/content").read_text() == "new"
    assert (tmp_path / "new/content").read_text() == "place"
    assert {entry.name for entry in tmp_path.iterdir()} == {"new", "place"}


def test_a_folder_goes_where_none_was(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    files.put_folder(tmp_path / "new", tmp_path / "place")
    assert [entry.name for entry in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_cannot_say_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.json_document({"duration_seconds": value})


def test_a_combining_mark_after_an_escape_does_not_break_the_document() -> None:
    assert files.json_document({"e\u0301": "\n\u0303"}) == '{\n  "é": "\\n\u0303"\n}\n'.encode()


def test_a_place_that_cannot_be_written_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingError) as refused, files.writing_to(tmp_path):
        (tmp_path / "file/below").mkdir()
    assert str(refused.value).startswith(f"cannot write {tmp_path}/file/below: Not a directory: name another folder")
