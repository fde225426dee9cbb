"""A run that is killed at every step, or fifty times at random, ends bit for bit as one that never was.

    .venv/bin/python benchmarks/kills.py every-step > benchmarks/results/kills_every_step_HARDWARE_YYYYMM.md
    .venv/bin/python benchmarks/kills.py chain > benchmarks/results/kills_chain_HARDWARE_YYYYMM.md

The quick start (configs/quickstart/simmim.yaml) at a hundredth of its cost (tests/support/kills.py has the overrides):
two processes, ZeRO-3, bf16, recomputed activations, attention in pieces, drop path, masks, augmentation, two workers.
Killed by SIGKILL, started again by the same command. Progress goes to stderr; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from machine import describe_machine, describe_versions

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.support.kills import PEER_LOST, Course, End, chain, newest_step, plan  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    every = commands.add_parser("every-step", help="one run for each step, killed there and started again")
    every.add_argument("--steps", type=int, default=30)
    random = commands.add_parser("chain", help="one run, killed again and again at random moments")
    random.add_argument("--kills", type=int, default=50)
    random.add_argument("--steps", type=int, default=200)
    random.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.command == "every-step":
            return every_step(Path(folder), arguments.steps)
        return random_chain(Path(folder), arguments.steps, arguments.kills, arguments.seed)


def every_step(folder: Path, steps: int) -> int:
    course = Course(folder / "shards", total_steps=steps, save_every=7)
    say_where("A run killed at every step", course, folder)
    unbroken = course.finish(folder / "unbroken")
    say_unbroken(unbroken)
    print(
        "| killed at step | rank killed | exit codes | resumed from | recomputed | trace | tensors | generators | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    num_equal = 0
    for step in range(1, steps + 1):
        started = time.monotonic()
        run, victim = folder / f"killed-{step}", step % 2
        life = course.start(run)
        reached = life.until(lambda life=life, step=step: life.step >= step)  # type: ignore[misc]
        assert reached or step == steps, "it ended before it was killed"  # the last step's save may be quicker than us
        codes = life.kill(victim).codes
        last, resumed_from = life.step, newest_step(run)
        end = course.finish(run)
        equal = end.rows == unbroken.rows, end.tensors == unbroken.tensors, end.generators == unbroken.generators
        ended_rightly = codes[victim] in (-signal.SIGKILL, 0) and codes[1 - victim] in (PEER_LOST, 0)
        num_equal += all(equal) and ended_rightly
        took = time.monotonic() - started
        cells = [last, victim, codes, resumed_from, last - resumed_from, *map(said, equal), f"{took:.0f}"]
        say_row(cells, f"{step}/{steps}")
    print(f"\n{num_equal} of {steps} runs ended as the unbroken one, to the last bit.")
    return int(num_equal < steps)


def random_chain(folder: Path, steps: int, count: int, seed: int) -> int:
    course = Course(folder / "shards", total_steps=steps, save_every=4, epoch=42)
    say_where(f"A run killed {count} times", course, folder)
    print(f"- {steps} steps, epochs of {course.epoch} samples, seed {seed}")
    unbroken = course.finish(folder / "unbroken")
    say_unbroken(unbroken)
    print("| kill | in | rank | exit codes | last step | newest whole checkpoint | to recompute | s |")
    print("|---|---|---|---|---|---|---|---|")
    deaths = []
    for number, death in enumerate(chain(course, folder / "run", plan(count, seed, course.save_every)), 1):
        deaths.append(death)
        ranks = " and ".join(map(str, death.kill.victims))
        cells = [number, death.kill.kind, ranks, death.codes, death.step or "-", death.saved_step]
        say_row([*cells, death.recomputed, f"{death.seconds:.0f}"], f"{number}/{count}")
    end = course.finish(folder / "run")
    most = max(death.recomputed for death in deaths)
    kinds = ", ".join(f"{number} in {kind}" for kind, number in Counter(d.kill.kind for d in deaths).items())
    print(f"\n- kills: {kinds}")
    beside = max(death.beside_save for death in deaths)
    without = max(death.recomputed - death.beside_save for death in deaths)
    print(f"- steps to recompute after a kill: {most} at most; a save interval has {course.save_every}")
    print(f"- of them {beside} at most were made while a checkpoint was written that never appeared; others: {without}")
    print(f"- trace and the unbroken run's: {said(end.rows == unbroken.rows)}")
    print(f"- tensors and the unbroken run's: {said(end.tensors == unbroken.tensors)}")
    return int(end != unbroken)


def say_where(title: str, course: Course, folder: Path) -> None:
    command = " ".join(course.arguments).replace(str(folder), "FOLDER").replace(f"{REPOSITORY}/", "")
    print(f"# {title}\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed', 'webdataset', 'numpy')}")
    print(f"- command: `.venv/bin/python benchmarks/kills.py {' '.join(sys.argv[1:])}`")
    print(f"- each life, by two processes: `launch/pretrain.py {command} --run-dir FOLDER/RUN`")


def say_unbroken(end: End) -> None:
    print(f"- unbroken run: trace {end.trace}")
    print(f"- unbroken run: float32 masters and Adam's moments {end.tensors}\n")
    print(
        "Trace: SHA-256 of each step's loss, learning rate, gradient norm, samples seen, data digest, validation loss\n"
    )


def say_row(cells: list[object], progress: str) -> None:
    line = "| " + " | ".join(map(str, cells)) + " |"
    print(line, flush=True)
    print(f"{progress}: {line}", file=sys.stderr, flush=True)


def said(is_so: bool) -> str:
    return "equal" if is_so else "DIFFERS"


if __name__ == "__main__":
    sys.exit(main())
