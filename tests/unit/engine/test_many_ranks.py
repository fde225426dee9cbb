"""What 512 ranks leave to rank 0: the manifest of their files, and the notes on the job's store."""

import json
import resource
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch.distributed

from swinv2_scale import dist
from swinv2_scale.engine import checkpoint
from swinv2_scale.engine.checkpoint import FileRecord, manifest_text
from swinv2_scale.engine.watchdog import Beat, missing_ranks

RANKS = 512


def test_the_manifest_of_512_ranks_is_read_back_as_it_was(tmp_path: Path) -> None:
    records = [
        FileRecord(f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt", rank, f"{rank:064x}")
        for rank in range(RANKS)
        for kind in ("optim", "model")
    ]
    path = tmp_path / checkpoint.name_of(1)
    path.mkdir()
    (path / checkpoint.MANIFEST).write_text(manifest_text(1, RANKS, records))
    found = checkpoint.read(path)
    assert (found.world_size, set(found.files)) == (RANKS, set(records))
    # Every rank hashes a share of the files when the job resumes.
    shares = [found.files[rank::RANKS] for rank in range(RANKS)]
    assert {len(share) for share in shares} == {2}


def test_the_silent_one_of_512_ranks_is_found_on_the_board(monkeypatch: pytest.MonkeyPatch) -> None:
    """One store, a note of each rank; a rank that looks for the missing one reads all. A connection takes 0.2 s."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    boards = [dist.Board() for _ in range(2)]

    def beat(number: int, silent: int | None = None) -> list[Beat]:
        for rank in range(RANKS):
            if rank != silent:
                boards[rank % 2].write(
                    str(rank), json.dumps(astuple(Beat(number, 9, 4, "training", f"node{rank // 8}")))
                )
        notes = boards[-1].read([str(rank) for rank in range(RANKS)])
        assert notes is not None
        return [Beat(*json.loads(note)) for note in notes]

    said = missing_ranks(beat(1), beat(2, silent=300))
    assert said == "rank 300 on node37 no longer answers, last seen at step 4 (training)"


def test_a_process_may_open_a_file_for_every_rank_where_the_usual_limit_is_too_low() -> None:
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4096)
    code = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (64, {most}))\n"
        "from swinv2_scale import dist\n"
        "dist.allow_open_files()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == f"{most} {most}\n"
