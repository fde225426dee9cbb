"""A process finds its place in the job from whatever its launcher says; what the launchers set was printed by them."""

import pytest

from swinv2_scale.errors import ClusterError
from swinv2_scale.launchers.place import Place, find, first_host

#: deepspeed 0.19.8, `deepspeed --num_gpus 2`, its second rank.
DEEPSPEED = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "LOCAL_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
}
#: torch 2.15, `torchrun --nproc-per-node 2`, its second rank.
TORCHRUN = {
    "LOCAL_RANK": "1",
    "RANK": "1",
    "GROUP_RANK": "0",
    "ROLE_RANK": "1",
    "ROLE_NAME": "default",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "1",
    "ROLE_WORLD_SIZE": "2",
    "MASTER_ADDR": "vm",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RUN_ID": "none",
}
#: Slurm 22.05.8, `srun --nodes 2 --ntasks-per-node 2` in a batch job, its last task.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
#: The batch shell of the same job.
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def test_each_launchers_words_mean_the_same_things() -> None:
    assert find(DEEPSPEED) == Place("deepspeed", 1, 2, 1, 2, 1, "127.0.0.1", 29500)
    assert find(TORCHRUN) == Place("torchrun", 1, 2, 1, 2, 1, "vm", 29500)
    assert find(SRUN) == Place("srun", 3, 4, 1, 2, 2, "n1", 20_000 + 7 * 16)
    assert find({"HOME": "/root"}) == Place("none", 0, 1, 0, 1, 1, "", 0)


@pytest.mark.parametrize("environ", [DEEPSPEED, TORCHRUN, SRUN, {}], ids=["deepspeed", "torchrun", "srun", "none"])
def test_a_place_that_was_adopted_is_found_again(environ: dict[str, str]) -> None:
    place = find(environ)
    again = find({**environ, **place.variables()})
    assert (again.rank, again.world_size, again.local_rank) == (place.rank, place.world_size, place.local_rank)
    assert (again.local_world_size, again.num_nodes) == (place.local_world_size, place.num_nodes)
    assert (again.address, again.port) == (place.address, place.port)


def test_torchrun_inside_an_srun_step_counts_its_own_processes() -> None:
    # One task of srun a node, each a torchrun that starts eight.
    own = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
    place = find({**SRUN, **TORCHRUN, **own})
    assert (place.launcher, place.rank, place.world_size, place.num_nodes) == ("torchrun", 9, 16, 2)


def test_nodes_with_different_numbers_of_tasks_are_counted_as_they_are() -> None:
    uneven = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_PROCID": "6"}
    place = find({**SRUN, **uneven, "SLURM_LOCALID": "0", "SLURM_NODEID": "2"})
    assert (place.local_rank, place.local_world_size, place.num_nodes) == (0, 1, 3)


def test_two_steps_of_one_job_get_different_ports_and_a_given_one_is_kept() -> None:
    assert find({**SRUN, "SLURM_STEP_ID": "1"}).port != find(SRUN).port
    assert all(20_000 <= find({**SRUN, "SLURM_JOB_ID": str(job)}).port < 32_768 for job in (1, 999_999, 67_108_863))
    given = find({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"})
    assert (given.address, given.port) == ("10.0.0.1", 4711)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-009,12],cpu1", "gpu007"),
        ("gpu[3,5-7]-ib", "gpu3-ib"),
        ("rack[2-3]node[01-16]", "rack2node01"),
        ("a,b", "a"),
        ("", ""),
    ],
)
def test_the_first_host_of_slurms_lists(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
        ({**DEEPSPEED, "RANK": "two"}, "'two', not a number"),
        ({**DEEPSPEED, "RANK": "2"}, "rank 2 of 2"),
        ({**DEEPSPEED, "LOCAL_RANK": "5"}, "5 of 2 on its node"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2"}, "4 tasks"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"}, "'many'"),
        (BATCH, "SLURM_NTASKS is 4"),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"}, "OMPI_COMM_WORLD_SIZE is 8"),
    ],
)
def test_what_does_not_add_up_is_refused_by_name(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ClusterError, match=named.replace("(", r"\(")) as error:
        find(environ)
    assert error.value.next_step
