"""Files that are replaced as a whole."""

from pathlib import Path

import pytest

from swinv2_scale.durable import write_whole


@pytest.mark.parametrize(("content", "found"), [("ä\n", b"\xc3\xa4\n"), (b"\xff\n", b"\xff\n")])
def test_the_new_content_stands_where_the_old_one_was_and_nothing_beside_it(
    tmp_path: Path, content: str | bytes, found: bytes
) -> None:
    path = tmp_path / "a.json"
    path.write_text("a longer one that was there before")
    write_whole(path, content)
    assert path.read_bytes() == found
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    (tmp_path / "a.json.part").symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
