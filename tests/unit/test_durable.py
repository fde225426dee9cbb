"""Files that are replaced as a whole."""

import resource
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


def test_a_link_under_the_temporary_name_is_replaced_not_written_through(tmp_path: Path) -> None:
    """Folders from somebody else are written to: ``shards index``, ``--resume``."""
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "a.json.part").symlink_to(outside)
    write_whole(tmp_path / "a.json", "new")
    assert outside.read_text() == "precious"
    assert (tmp_path / "a.json").read_text() == "new"
    assert not (tmp_path / "a.json").is_symlink()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(path, "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
