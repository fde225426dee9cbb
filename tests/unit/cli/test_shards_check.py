"""``swinv2-scale shards index|verify|stats|export`` as somebody types them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from swinv2_scale.cli.arguments import ArgumentParser
from swinv2_scale.cli.shards_check import add_actions
from swinv2_scale.errors import ScaleError
from tests.support.pictures import encoded, noise


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tars of five labelled images each, by somebody else."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "s"
    path.mkdir()
    for shard in range(2):
        with tarfile.open(path / f"{shard}.tar", "w") as file:
            for number in range(5):
                picture = encoded(noise(5 * shard + number, 9, 8), "PNG")
                for extension, content in (("png", picture), ("cls", b"%d" % (number % 2))):
                    info = tarfile.TarInfo(f"{shard}{number}.{extension}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return path


def shards(*words: object) -> int:
    """Run a command; its exit code."""
    parser = ArgumentParser("shards")
    add_actions(parser.add_subparsers(required=True))
    try:
        arguments = parser.parse_args([str(word) for word in words])
        arguments.run(arguments)
    except ScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_index_then_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shards("index", folder, "--processes", 2) == 0
    said = capsys.readouterr().out
    assert f"10 samples in 2 shards of {folder}" in said
    assert f"use data.train={folder}/*.tar" in said
    assert shards("verify", folder, "--processes", 2) == 0
    assert capsys.readouterr().out == "0 of 10 samples are damaged\n"
    assert shards("verify", f"{folder}/{{0,1}}.tar", "--processes", 1, "--no-decode") == 0


def test_verify_names_what_is_damaged_and_ends_with_65(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards("index", folder, "--processes", 1)
    damage(folder / "1.tar", 600)
    capsys.readouterr()
    assert shards("verify", folder, "--processes", 1) == 65
    said = capsys.readouterr().out
    assert f"damaged: {folder}/1.tar isn't as its manifest says" in said
    row = next(line for line in said.splitlines() if line.startswith("1.tar"))
    assert row.split()[:3] == ["1.tar", "0", "10"]
    assert "1 of 10 samples are damaged" in said
    assert shards("verify", folder, "--processes", 1, "--json") == 65
    data = json.loads(capsys.readouterr().out)
    assert (data["is_whole"], data["num_damaged"], data["num_samples"]) == (False, 1, 10)
    assert (data["damaged"][0]["number"], data["damaged"][0]["key"]) == (0, "10")


def test_index_stops_at_damage_or_lists_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder / "0.tar", 2048)  # the third member's header: of the second sample
    assert shards("index", folder, "--processes", 1) == 65
    assert "0.tar is cut or damaged at byte 2048, in or after sample 0 ('00')" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["0.tar", "1.tar"]
    assert shards("index", folder, "--processes", 1, "--skip-damaged") == 0
    said = capsys.readouterr().out
    assert "9 samples in 2 shards" in said
    assert "1 samples are left out" in said
    row = next(line for line in said.splitlines() if line.startswith("0.tar"))
    assert row.split()[:2] == ["0.tar", "01"]
    assert shards("verify", folder, "--processes", 1) == 0


def test_a_command_is_started_only_when_it_is_allowed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = f"pipe:cat {folder}/{{0,1}}.tar"
    assert shards("index", pattern, "--processes", 1) == 78
    assert not (folder.parent / "shards" / "index").exists() or not list(folder.parent.rglob("manifest.json"))
    assert shards("index", pattern, "--allow-command", "cat", "--processes", 1, "--index-dir", "apart") == 0
    assert "with data.index_dir=apart" in capsys.readouterr().out
    words = ("--allow-command", "cat", "--processes", 1, "--index-dir", "apart")
    assert shards("verify", pattern, *words) == 0
    assert "0 of 10 samples are damaged" in capsys.readouterr().out


def test_stats_counts_and_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards("index", folder, "--processes", 1)
    capsys.readouterr()
    assert shards("stats", folder, "--sheet", "sheet.png", "--rows", 2, "--columns", 3) == 0
    said = capsys.readouterr().out
    assert "10 samples in 2 shards" in said
    assert "from all samples" in said
    assert "members: cls (all), png (all)" in said
    assert Image.open("sheet.png").format == "PNG"
    assert shards("stats", folder, "--json", "--samples", 4) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["samples"], data["looked_at"]) == (10, 4)
    assert shards("stats", folder, "--samples", 4) == 0
    assert "from 4 drawn samples" in capsys.readouterr().out


def test_export_makes_a_folder_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards("index", folder, "--processes", 1)
    assert shards("export", folder, "out") == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["0", "1"]
    assert len(list(Path("out").rglob("*.png"))) == 10
    assert shards("export", folder, "out") == 73


def test_names_from_outside_cannot_command_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(folder / "0.tar", "w") as file:
        for extension in ("png", "cls"):
            info = tarfile.TarInfo(f"\x1b[31m[bold]red\n.{extension}")
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
    shards("index", folder, "--processes", 1)
    assert shards("verify", folder, "--processes", 1) == 65
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "[bold]red" in said


def test_nothing_is_imported_before_a_command_runs() -> None:
    code = """
import sys
from swinv2_scale.cli.shards_check import add_actions
from swinv2_scale.cli.arguments import ArgumentParser
add_actions(ArgumentParser("shards").add_subparsers())
print([name for name in ("torch", "numpy", "PIL", "webdataset") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
