"""The shell files of launch/slurm/: well-formed, and the two batch files are one but for their names."""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "launch" / "slurm"
FILES = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])


def test_the_files_are_there():
    assert {"pretrain.sbatch", "finetune.sbatch", "job.sh", "site.sh"} == {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_well_formed(path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    command = ["shellcheck", "--external-sources", str(path)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_batch_files_differ_in_their_names_alone():
    pretrain, finetune = ((FOLDER / f"{name}.sbatch").read_text().splitlines() for name in ("pretrain", "finetune"))
    differing = [(a, b) for a, b in zip(pretrain, finetune, strict=True) if a.replace("pretrain", "finetune") != b]
    assert differing == [(pretrain[1], finetune[1])]  # the line that says what it is


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_batch_file_can_be_preempted_requeued_and_read(name):
    text = (FOLDER / f"{name}.sbatch").read_text()
    for line in ("--signal=USR1@300", "--requeue", "--open-mode=append", "--output="):
        assert f"\n#SBATCH {line}" in text
