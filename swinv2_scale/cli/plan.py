"""``swinv2-scale plan``: memory, speed and cost of a run before it is queued. Torch is never imported."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swinv2_scale.cli.arguments import positive_int
from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import RunConfig, patterns_of
from swinv2_scale.errors import ConfigError, DataError, printable
from swinv2_scale.plan.machines import DEVICES, Cluster, parse_bytes
from swinv2_scale.plan.report import make_plan


def add_commands(commands: Any) -> None:
    plan = commands.add_parser("plan", help="memory, speed and days of a run, and what to change if it doesn't fit")
    plan.add_argument("file")
    plan.add_argument("overrides", nargs="*", metavar="key.path=value")
    plan.add_argument("--gpus", type=positive_int, metavar="N", help="of all nodes (default: cluster.world_size)")
    plan.add_argument("--nodes", type=positive_int, metavar="N", help="default: as few as hold eight GPUs each")
    plan.add_argument("--device", choices=tuple(DEVICES), default="a100", help="default: %(default)s (40 GiB)")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="of one GPU, as 40GiB (default: the device's)")
    plan.add_argument("--peak-tflops", type=float, metavar="X", help="16 bit (float32 for fp32; default: the device's)")
    plan.add_argument("--efficiency", type=float, default=0.4, metavar="X", help="reached of it (%(default)s)")
    plan.add_argument("--network", type=float, default=1600, metavar="GBIT", help="Gbit/s of a node (%(default)s)")
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.file, arguments.overrides).config
    found = {"config": arguments.file, **make_plan(config, _cluster(arguments, config)), "data": _data(config)}
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found, config)


def _cluster(arguments: argparse.Namespace, config: RunConfig) -> Cluster:
    gpus = arguments.gpus or config.cluster.world_size
    if gpus is None:
        raise ConfigError("how many GPUs?", "--gpus N")
    device = DEVICES[arguments.device]
    if arguments.gpu_memory:
        device = replace(device, memory_bytes=parse_bytes(arguments.gpu_memory))
    if arguments.peak_tflops is not None:
        device = replace(device, tflops_16bit=arguments.peak_tflops, tflops_32bit=arguments.peak_tflops)
    for name, value in (("--efficiency", arguments.efficiency), ("--network", arguments.network)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value} is no rate", "a number above 0")
    if not 0 < device.tflops_16bit < float("inf") or arguments.efficiency > 1:
        raise ConfigError(
            f"--efficiency {arguments.efficiency} of --peak-tflops {device.tflops_16bit} can't be reached",
            "a share between 0 and 1 of a rate above 0",
        )
    nodes = arguments.nodes or config.cluster.num_nodes or -(-gpus // 8)
    return Cluster(device, gpus, nodes, arguments.network, arguments.efficiency)


def _data(config: RunConfig) -> dict[str, Any]:
    """What the manifests of the training shards say, where they lie on a disk here.

    Manifests alone are read: finding shards as a run does would import webdataset, and torch with it.
    """
    from swinv2_scale.data.shards.manifest import MANIFEST_NAME, index_folder, read_manifest, split_location

    shards = samples = 0
    for pattern in patterns_of(config.data.train):
        if ":" in pattern:
            return {"is_known": False, "why": f"{pattern} isn't on a disk here"}
        folder, name = split_location(pattern)
        apart = index_folder(config.data.index_dir, folder)
        try:
            is_named = _name_test(name)
            manifest = read_manifest(str(apart) if (apart / MANIFEST_NAME).exists() else folder)
        except (ConfigError, DataError) as error:
            return {"is_known": False, "why": error.message}
        found = [entry for entry in manifest.entries.values() if is_named(entry.name)]
        shards, samples = shards + len(found), samples + sum(entry.samples for entry in found)
    images = config.optim.total_steps * config.data.global_batch_size
    return {"is_known": True, "shards": shards, "samples": samples, "epochs": images / max(samples, 1)}


def _name_test(pattern: str) -> Callable[[str], bool]:
    """Whether a shard's name is one of a glob, or of one range in braces.

    Raises:
        ConfigError: other braces.
    """
    before, brace, rest = pattern.partition("{")
    if not brace:
        return lambda name: fnmatchcase(name, pattern)
    numbers, _, after = rest.partition("}")
    ends = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", numbers)
    if not ends or "{" in after:
        raise ConfigError(f"only a range of numbers in braces is understood here, not {pattern}")
    first, last = int(ends[1]), int(ends[2])
    wanted = re.compile(re.escape(before) + "([0-9]+)" + re.escape(after))

    def is_named(name: str) -> bool:
        number = wanted.fullmatch(name)
        is_as_long = number is not None and (len(number[1]) == len(ends[1]) or ends[1][0] != "0")
        return number is not None and is_as_long and first <= int(number[1]) <= last

    return is_named


def _show(found: dict[str, Any], config: RunConfig) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=132)  # piped, a table must not be cut to 80 columns
    cluster, schedule, parameters = found["cluster"], found["schedule"], found["parameters"]
    device = cluster["device"]
    _say(
        console,
        f"{found['config']}: SwinV2 {config.model.variant}, {parameters['total']:,} parameters "
        f"({parameters['task']:,} of them the {config.task.name} head's)",
        f"{cluster['gpus']} x {device['name']} of {_size(device['memory_bytes'])} on {cluster['nodes']} nodes; a step: "
        f"{schedule['global_batch_size']:,} images = {cluster['gpus']} GPUs x {schedule['micro_batch_size']} x "
        f"{schedule['micro_batches']} accumulated; {schedule['steps']:,} steps, {schedule['images']:,} images",
        _data_line(found["data"]),
    )
    console.print(_memory_table(found["memory"], config))
    console.print(_zero_table(found["zero"]))
    console.print(_activation_table(found["activations"]))
    _say_costs(console, found)
    _say_verdict(console, found)


def _data_line(data: dict[str, Any]) -> str:
    if not data["is_known"]:
        return f"training data: not looked at ({data['why']})"
    return f"training data: {data['samples']:,} samples in {data['shards']:,} shards, {data['epochs']:.1f} epochs"


def _memory_table(memory: dict[str, Any], config: RunConfig) -> Table:
    engine = config.engine
    table = Table("one GPU", "GiB", "", title=f"memory, ZeRO stage {engine.zero_stage}, {engine.precision}")
    table.columns[1].justify = "right"
    rows = (
        ("weights", "weights", ""),
        ("masters", "float32 masters", "of the part that this GPU updates"),
        ("moments", "moments" + (" and average" if config.optim.ema_decay is not None else ""), "float32"),
        ("gradients", "gradients", "at the end of backward"),
        ("gathered", "gathered weights", f"whole for a while; {_size(memory['always_whole'])} of small ones always"),
        ("buckets", "buckets", "gradients on their way (engine.reduce_bucket_elements)"),
        (
            "activations_peak",
            "activations, at most",
            f"{_size(memory['activations_kept'])} kept from forward to backward",
        ),
        ("largest_scores", "  the largest attention tensor", "scores, float32; among the activations"),
        ("update", "the update", "when activations are gone"),
        ("total", "at most at once", f"with CUDA and NCCL; {_size(memory['limit'])} there are"),
        ("host", "host memory", "offloaded states, and buffers that files are read into"),
        ("activations_on_host", "host memory", "offloaded block inputs"),
        ("disk", "files", "of this GPU's process, in engine.offload.nvme_dir of its node"),
    )
    for key, name, remark in rows:
        if memory[key] or key in ("weights", "total"):
            table.add_row(name, f"{memory[key] / 2**30:,.2f}", remark)
    return table


def _zero_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", "ZeRO", title="stages compared: GiB of one GPU, and speed (the paper trained G with stage 1)")
    for name in ("weights", "masters, moments", "gradients", "gathered, buckets", "in all", "images/s", "days"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        sizes = ("weights", "masters_and_moments", "gradients", "gathered_and_buckets", "total")
        table.add_row(
            ">" if row["is_configured"] else "",
            f"{row['stage']}{', gathers in the node (hpZ)' if row['hpz'] else ''}",
            *(f"{row[key] / 2**30:,.2f}" for key in sizes),
            f"{row['images_per_s']:,.0f}",
            f"{row['days']:,.1f}",
            "fits" if row["fits"] else "too large",
        )
    return table


def _activation_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", "activation checkpointing", "attention", title="activations of one micro-batch, GiB")
    for name in ("kept", "at most", "largest scores"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = (f"{row[key] / 2**30:,.2f}" for key in ("kept", "peak", "largest_scores"))
        table.add_row(">" if row["is_configured"] else "", row["checkpointing"], row["attention"], *sizes)
    return table


def _say_costs(console: Console, found: dict[str, Any]) -> None:
    flops, speed, saved = found["flops"], found["speed"], found["checkpoint"]
    traffic = ", ".join(
        f"{item['kind']} of {item['what']} {item['bytes'] / 1e9:.2f} GB ({item['seconds']:.2f} s)"
        for item in found["traffic"]
    )
    _say(
        console,
        f"checkpoint: {_size(saved['bytes'])}, at most {_size(saved['largest_of_a_process'])} of one process (and as "
        f"much of its host's memory while it is written); one every {saved['hours_between']:.2f} h, {saved['saves']:,}",
        f"one image: {flops['forward'] / 1e9:,.1f} GFLOP forward, {flops['training'] / 1e9:,.1f} to train, "
        f"{flops['recomputed'] / 1e9:,.1f} more recomputed",
        f"a step: {speed['compute_s']:.2f} s of arithmetic, {speed['communication_s']:.2f} s of communication, "
        f"{speed['waiting_s']:.2f} s of it waited for",
        f"  {traffic}",
        f"expected: {speed['images_per_s']:,.0f} images/s, {speed['days']:.1f} days for all steps, if:",
        *(f"  - {line}" for line in found["assumptions"]),
    )


def _say_verdict(console: Console, found: dict[str, Any]) -> None:
    memory, changes = found["memory"], found["changes"]
    total, limit = _size(memory["total"]), _size(memory["limit"])
    if memory["fits"]:
        largest = found["largest_micro_batch"]
        _say(console, f"It fits: {total} of {limit}. The largest data.micro_batch_size that would: {largest}.")
        return
    _say(console, f"It does not fit: {total} of {limit}. What to change, cheapest first, each on top of the last:")
    for change in changes:
        what = " ".join(change["overrides"]) or f"--gpus {change['gpus']}"
        verdict = "fits" if change["total"] <= memory["limit"] else "not yet"
        _say(console, f"  {what}\n      -> {_size(change['total'])}, {verdict} ({change['price']})")
    if not changes or changes[-1]["total"] > memory["limit"]:
        _say(console, "  Nothing here is enough: a smaller model, image or window, or GPUs with more memory.")


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(Text("\n".join(map(printable, line.split("\n")))), soft_wrap=True)


def _size(num_bytes: int) -> str:
    """GiB, and MiB below one."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
