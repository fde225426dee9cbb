"""``swinv2-scale submit``: the shipped batch file with a job's values in it, and everything that is found before."""

import os
import subprocess
from pathlib import Path

import pytest

from swinv2_scale.cli.main import main
from tests.support.small_run import write_config

LAUNCH = Path(__file__).parents[3] / "launch"
#: A name that a shell would take apart, or obey.
ODD = "a b;touch $(touch x)`touch x`'\"\\*"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path, tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["submit", *map(str, words), "--print"]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    try:
        code = main(["submit", *map(str, words)])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 78
    return capsys.readouterr().err


def test_what_is_submitted_is_the_shipped_file_but_for_the_lines_that_are_filled_in(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(capsys, config, "--nodes", 1, "--gpus-per-node", 4).splitlines()
    shipped = (LAUNCH / "slurm" / "pretrain.sbatch").read_text().splitlines()
    filled = [new for old, new in zip(shipped, lines, strict=True) if old != new]
    folder = config.parent
    assert filled == [
        f"#SBATCH --job-name={folder.name}-small",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        f"repository={LAUNCH.parent}",
        f"site={LAUNCH}/slurm/site.sh",
        f"config={config}",
        f"run={folder}/runs/{folder.name}-small",
        "arguments=(cluster.num_nodes=1 cluster.world_size=4)",
    ]


def test_everything_that_can_be_said_comes_into_the_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--nodes", 2, "--gpus-per-node", 2, "--cpus-per-task", 16, "--time", "2-12:30")
    text = printed(capsys, config, *size, "--run-dir", "runs/x", "optim.lr=1e-4", "seed=3")
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --time=2-12:30",
        "arguments=(optim.lr=1e-4 seed=3 cluster.num_nodes=2 cluster.world_size=4)",
    ):
        assert f"\n{line}\n" in text


def test_a_stage_that_goes_on_from_weights_is_fine_tuned(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, config, "init_from=runs/first", "--nodes", 1, "--gpus-per-node", 1)
    assert "script=$repository/launch/finetune.py" in text


def test_no_shell_takes_a_name_apart(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / ODD
    odd.mkdir()
    config = config.rename(odd / config.name)
    (odd / "site.sh").write_text("")
    where = ("--run-dir", odd / "run", "--site", odd / "site.sh", f"data.shards_dir={odd}")
    text = printed(capsys, config, "--nodes", 1, "--gpus-per-node", 1, *where)
    values = [line for line in text.splitlines() if line.startswith(("site=", "config=", "run=", "arguments="))]
    said = "\n".join([*values, 'printf "%s\\0" "$site" "$config" "$run" "${arguments[@]}"'])
    shell = subprocess.run(["bash", "-c", said], capture_output=True, text=True, timeout=60, check=True)
    assert shell.stdout.split("\0")[:4] == [f"{odd}/site.sh", str(config), f"{odd}/run", f"data.shards_dir={odd}"]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["--nodse", "8"], "unrecognized arguments"),
        (["--nodes", "0"], "0 is less than 1"),
        (["--nodes", "3"], "is not a multiple of data.micro_batch_size 4 x 3 processes"),
        (["cluster.num_nodes=4"], "cluster.num_nodes is 4, the job would have 1"),
        (["cluster.world_size=4"], "cluster.world_size is 4, the job would have 1"),
        (["--time", "soon"], "'soon' is no time"),
        (["--time", "10"], "10 is no more than the 600 s in which a job starts and saves"),
        (["--time", "00:09:59"], "in which a job starts and saves"),
        (["--after", "1;rm"], "is no job's number"),
        (["--site", "mine.sh"], "there is no site file mine.sh"),
        (["--run-dir", "a\nb"], "control characters"),
    ],
    ids=str,
)
def test_what_is_wrong_is_found_before_anything_is_queued(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    defaults = ["--gpus-per-node", "1", *([] if "--nodes" in words else ["--nodes", "1"])]
    assert said in refused(capsys, config, *defaults, *words, "--print")


@pytest.mark.parametrize("time", ["11", "10:01", "1:00:00", "1-0", "1-0:0", "3-12:30:00"])
def test_times_are_written_as_slurm_reads_them(config: Path, capsys: pytest.CaptureFixture[str], time: str) -> None:
    text = printed(capsys, config, "--nodes", 1, "--gpus-per-node", 1, "--time", time)
    assert f"#SBATCH --time={time}\n" in text


def test_without_slurm_the_file_can_still_be_seen(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(config.parent))
    assert "--print" in refused(capsys, config, "--nodes", 1, "--gpus-per-node", 1)
    assert not (config.parent / "runs").exists()


#: Another program's part: keeps what it is given.
SBATCH = """#!/bin/sh
echo "$@ account=$SBATCH_ACCOUNT" >> asked; cat > given
[ -e full ] && { echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }
echo "4711;cluster"
"""


def test_sbatch_gets_the_file_and_the_site_s_account_and_the_user_is_told_what_follows(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = config.parent
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    (folder / "site.sh").write_text("echo welcome\nexport SBATCH_ACCOUNT=mine\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    words = ("submit", str(config), "--nodes", "1", "--gpus-per-node", "1", "--site", "site.sh", "--run-dir", "runs/x")
    assert main([*words]) == 0
    said = capsys.readouterr().out
    assert f"log     {folder}/slurm-x-4711.out" in said
    assert "follow  swinv2-scale status runs/x" in said
    assert (folder / "runs" / "x").is_dir()
    assert (folder / "asked").read_text() == "--parsable account=mine\n"
    assert (folder / "given").read_text() == printed(capsys, *words[1:])
    assert main([*words, "--after", "12", "--parsable"]) == 0
    assert capsys.readouterr().out == "4711\n"
    assert "--dependency=afterok:12 --kill-on-invalid-dep=yes" in (folder / "asked").read_text()
    (folder / "full").touch()
    assert "QOSMaxSubmitJobPerUserLimit" in refused(capsys, *words[1:])
