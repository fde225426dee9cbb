"""What DeepSpeed swaps through: plain files, one job's alone."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from swinv2_scale.config.run import OffloadConfig
from swinv2_scale.engine.swap_files import SwapFiles, SwapFolder
from swinv2_scale.errors import OutputError


class Engine:
    """Something that goes away."""


def folder(path: Path) -> SwapFolder:
    return SwapFolder(OffloadConfig(optimizer_states="nvme", nvme_dir=str(path)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_and_mapped(tmp_path: Path, dtype: torch.dtype) -> None:
    files, path = SwapFiles(), str(tmp_path / "a.swp")
    values = torch.arange(1000).to(dtype)
    assert files.async_pwrite(values, path, 0) == 0
    assert files.wait() == 1
    found = torch.zeros_like(values)
    files.async_pread(found[:600], path, 0)
    files.async_pread(found[600:], path, 600 * values.itemsize)
    assert files.wait() == 2
    assert files.wait() == 0
    assert torch.equal(found, values)
    mapped = torch.from_file(path, shared=True, size=1000, dtype=dtype)
    mapped[7] = 3
    files.async_pread(found, path, 0)
    files.wait()
    assert found[7] == 3


def test_only_its_own_buffers_count_as_pinned() -> None:
    files = SwapFiles(block_size=1, queue_depth=1)
    buffer = files.new_cpu_locked_tensor(100, torch.zeros(1, dtype=torch.bfloat16))
    assert buffer.dtype == torch.bfloat16
    assert SwapFiles().is_pinned(buffer[40:50])  # of one process, whichever handle made it
    assert not files.is_pinned(torch.empty(100))
    assert not files.is_pinned(torch.empty(0))
    files.free_cpu_locked_tensor(buffer)
    assert not files.is_pinned(buffer)


def test_a_file_that_is_too_short_or_gone_is_said(tmp_path: Path) -> None:
    files, path = SwapFiles(), tmp_path / "a.swp"
    path.write_bytes(bytes(10))
    files.async_pread(torch.empty(10), str(path), 0)
    with pytest.raises(OutputError, match=r"a\.swp: it ends after 10 of 40 bytes"):
        files.wait()
    files.async_pread(torch.empty(10), str(tmp_path / "b.swp"), 0)
    with pytest.raises(OutputError, match=r"b\.swp: No such file"):
        files.wait()


def test_a_full_disk_is_said_with_what_to_do() -> None:
    files = SwapFiles()
    files.async_pwrite(torch.zeros(10), "/dev/full", 0)
    with pytest.raises(OutputError, match="No space left") as refusal:
        files.wait()
    assert "engine.offload.nvme_dir" in refusal.value.next_step


def test_two_jobs_never_swap_to_one_folder(tmp_path: Path) -> None:
    first = folder(tmp_path)
    with pytest.raises(OutputError, match="another job swaps to") as refusal:
        folder(tmp_path)
    assert "a folder of its own" in refusal.value.next_step
    engine = Engine()
    first.remove_with(engine)
    del engine
    gc.collect()
    folder(tmp_path)


def test_files_are_deleted_with_the_engine_and_after_a_kill(tmp_path: Path) -> None:
    mine = tmp_path / "zero_stage_3" / "optimizer" / "rank0" / "a.swp"
    others = mine.parents[1] / "rank1" / "a.swp"
    for path in (mine, others):
        path.parent.mkdir(parents=True)
        path.touch()
    engine = Engine()
    folder(tmp_path).remove_with(engine)
    assert not mine.exists()  # of a job that was killed
    assert others.exists()
    mine.parent.mkdir()
    mine.touch()
    del engine
    gc.collect()
    assert not mine.exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot use engine\.offload\.nvme_dir"):
        folder(tmp_path / "file" / "swap")


def test_deepspeeds_swappers_use_these_files_and_compile_nothing() -> None:
    from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper, partitioned_param_swapper

    for module in (partitioned_optimizer_swapper, partitioned_param_swapper):
        assert module.AsyncIOBuilder().load().aio_handle is SwapFiles
