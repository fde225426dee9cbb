"""``swinv2-scale models``: a table to read and to grep, exact numbers as JSON, both without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from swinv2_scale import list_models
from swinv2_scale.config.model import VARIANTS
from tests.support.processes import REPOSITORY

#: Runs the console command and says, on the error output, whether torch or numpy came in.
CHILD = """
import sys
from swinv2_scale.cli.main import main
code = main(sys.argv[1:])
print("torch" in sys.modules, "numpy" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,  # a hang fails here instead of stopping CI
        check=False,
    )


@pytest.fixture(scope="module")
def piped() -> subprocess.CompletedProcess[str]:
    return command("models")


@pytest.fixture(scope="module")
def as_json() -> subprocess.CompletedProcess[str]:
    return command("models", "--json")


def rows(output: str) -> list[list[str]]:
    """The table's lines, cut at blanks: no cell has one inside, so that awk can cut them too."""
    return [line.split() for line in output.split("\n\n")[0].splitlines()[2:]]


def test_both_forms_end_with_0_and_without_torch(piped, as_json):
    for result in (piped, as_json):
        assert (result.returncode, result.stderr) == (0, "False False\n")


def test_every_model_that_can_be_created_has_rows_and_no_other(piped):
    names = [row[0] for row in rows(piped.stdout)]
    assert list(dict.fromkeys(names)) == list_models()


def test_the_table_prints_what_microsofts_readme_prints(piped):
    # 28M, 88M and 197M parameters; 5.9G, 54.7G and 115.4G.
    table = rows(piped.stdout)
    assert ["swinv2_tiny", "96", "2,2,6,2", "3,6,12,24", "28.3", "256", "8", "5.9"] in table
    assert ["swinv2_base", "128", "2,2,18,2", "4,8,16,32", "87.9", "384", "24", "54.7"] in table
    assert ["swinv2_large", "192", "2,2,18,2", "6,12,24,48", "196.7", "384", "24", "115.4"] in table


def test_the_table_has_the_giant_of_the_paper_at_its_three_sizes(piped):
    giant = [row for row in rows(piped.stdout) if row[0] == "swinv2_giant"]
    assert [row[5:7] for row in giant] == [["192", "12"], ["640", "40"], ["1536", "32"]]
    assert {tuple(row[1:5]) for row in giant} == {("512", "2,2,42,4", "16,32,64,128", "3001.9")}
    assert [row[7] for row in giant[:2]] == ["370.7", "4639.3"]


def test_a_note_tells_the_two_models_called_giant_apart(piped):
    notes = " ".join(piped.stdout.split("\n\n")[1].split())
    assert """swinv2_1b is what Microsoft's model hub calls "giant" or "g" (1.06 billion""" in notes
    assert "The paper's SwinV2-G, of 3.0 billion, is swinv2_giant." in notes


def test_a_pipe_gets_whole_cells_plain_text_and_at_most_100_columns(piped):
    assert "…" not in piped.stdout
    assert "\x1b" not in piped.stdout
    assert all(len(row) == 8 for row in rows(piped.stdout))
    assert max(map(len, piped.stdout.splitlines())) <= 100


def test_the_json_has_exact_numbers(as_json):
    models = json.loads(as_json.stdout)
    giant = next(model for model in models if model["name"] == "swinv2_giant")
    assert giant == {
        "name": "swinv2_giant",
        "embed_dim": 512,
        "depths": [2, 2, 42, 4],
        "num_heads": [16, 32, 64, 128],
        "num_classes": 1000,
        "parameters": 2_997_843_680 + 4096 * 1000 + 1000,
        "image_size": 192,
        "window_size": 12,
        "multiply_adds": 370_738_855_936,
    }


def test_the_json_has_the_rows_of_the_table_and_the_shapes_of_the_variants(piped, as_json):
    models = json.loads(as_json.stdout)
    shown = [(row[0], row[5], row[6]) for row in rows(piped.stdout)]
    assert [(m["name"], str(m["image_size"]), str(m["window_size"])) for m in models] == shown
    for model in models:
        variant = VARIANTS[model["name"].removeprefix("swinv2_")]
        for key in ("embed_dim", "depths", "num_heads"):
            assert json.dumps(variant[key]) == json.dumps(model[key])


def test_an_unknown_option_is_a_usage_error():
    result = command("models", "--jsn")
    assert result.returncode == 78
    assert "--jsn" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_readme_shows_what_is_printed(piped):
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line.rstrip() for line in piped.stdout.splitlines() if line.rstrip() not in readme] == []
