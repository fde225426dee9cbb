"""``swinv2-scale shards index|verify|stats|export``: what there is to do with shards, whoever made them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swinv2_scale.cli.arguments import positive_int
from swinv2_scale.cli.progress import progress_bar
from swinv2_scale.errors import ExitCode, printable

if TYPE_CHECKING:
    from swinv2_scale.data.inspection.stats import Stats
    from swinv2_scale.data.remote.files import RemoteFiles

_PATTERN = "as in data.train: a path, {000..127}, a glob, several joined by ::, http(s)://, s3://, gs://, pipe:COMMAND"
_SHOWN_ROWS = 100


def add_actions(actions: Any) -> None:
    index = actions.add_parser("index", help="make the manifest of anyone's tars (img2dataset's, webdataset's, ..)")
    index.add_argument("pattern", metavar="FOLDER_OR_PATTERN", help=f"a folder of *.tar, or {_PATTERN}")
    words = "leave out what is damaged, and list it; else the first damage ends the command"
    index.add_argument("--skip-damaged", action="store_true", help=words)
    _add_places(index, "where manifests go (default: beside the shards; shards/index where that isn't possible)", None)
    _add_processes(index)
    index.set_defaults(run=_index)

    verify = actions.add_parser("verify", help="find every damaged byte, and which samples it hits")
    verify.add_argument("pattern", metavar="PATTERN", help=_PATTERN)
    verify.add_argument("--no-decode", action="store_true", help="checksums only: don't decode images, clips, labels")
    _add_places(verify, "where manifests lie that aren't beside their shards (default: %(default)s)", "shards/index")
    _add_processes(verify)
    verify.add_argument("--json", action="store_true", help="all of it, for scripts")
    verify.set_defaults(run=_verify)

    stats = actions.add_parser("stats", help="counts, sizes, labels, and a contact sheet to look at")
    stats.add_argument("pattern", metavar="PATTERN", help=_PATTERN)
    words = "look into so many samples, drawn from all shards; 0: into every one (default: %(default)s)"
    stats.add_argument("--samples", type=_count, default=10_000, metavar="N", help=words)
    stats.add_argument("--seed", type=int, default=0, help="of the samples that are drawn (default: %(default)s)")
    stats.add_argument("--sheet", type=Path, metavar="PNG", help="draw a contact sheet (replaced)")
    stats.add_argument("--rows", type=positive_int, default=6, metavar="N", help="of the sheet (default: %(default)s)")
    stats.add_argument("--columns", type=positive_int, default=10, metavar="N", help="(default: %(default)s)")
    _add_places(stats, "where manifests lie that aren't beside their shards (default: %(default)s)", "shards/index")
    stats.add_argument("--json", action="store_true", help="for scripts")
    stats.set_defaults(run=_stats)

    export = actions.add_parser("export", help="back to a folder: CLASS/KEY.EXT")
    export.add_argument("pattern", metavar="PATTERN", help=_PATTERN)
    export.add_argument("destination", type=Path, metavar="DST", help="a folder that isn't there yet")
    _add_places(export, "where manifests lie that aren't beside their shards (default: %(default)s)", "shards/index")
    export.set_defaults(run=_export)


def _add_places(parser: argparse.ArgumentParser, words: str, default: str | None) -> None:
    parser.add_argument("--index-dir", default=default, metavar="FOLDER", help=words)
    words = "a program that pipe: shards may start; repeat it for more"
    parser.add_argument("--allow-command", action="append", default=[], metavar="NAME", help=words)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=positive_int, default=cores, metavar="N", help="(default: one a core)")


def _count(text: str) -> int:
    return 0 if text == "0" else positive_int(text)


def _index(arguments: argparse.Namespace) -> None:
    from swinv2_scale.data.shards.folder_index import index_folders, tars_of
    from swinv2_scale.data.shards.shard_set import expand_pattern

    remote = _remote(arguments)
    locations = expand_pattern(tars_of(arguments.pattern), remote)
    with progress_bar("indexing") as show:
        folders = index_folders(
            locations,
            remote,
            index_dir=arguments.index_dir,
            skip_damaged=arguments.skip_damaged,
            processes=arguments.processes,
            on_progress=lambda done: show(done, len(locations)),
        )
    for folder in folders:
        samples = sum(entry.samples for entry in folder.scanned)
        print(f"{samples} samples in {len(folder.scanned)} shards of {printable(folder.folder)}")
        if folder.changed:
            print(f"  {folder.changed} of these shards have other bytes than in the manifest before")
        if folder.kept:
            print(f"  {folder.kept} shards that were in the manifest already stay in it as they were")
        if folder.passed_over:
            print(f"  {folder.passed_over} files are no part of a sample (hidden or without extension)")
        if folder.left_out:
            count = sum(left.samples for left in folder.left_out)
            print(f"  {'at least ' if folder.is_cut else ''}{count} samples are left out:")
            _print_table(("shard", "sample", "cause"), [(left.shard, left.key, left.cause) for left in folder.left_out])
        print(f"  manifest and indexes: {folder.destination}")
    print(f"use data.train={printable(tars_of(arguments.pattern))}")
    if arguments.index_dir:
        print(f"with data.index_dir={arguments.index_dir}")


def _verify(arguments: argparse.Namespace) -> None:
    from swinv2_scale.data.inspection.verify import verify
    from swinv2_scale.data.shards.folder_index import tars_of

    with progress_bar("verifying") as show:
        verdict = verify(
            tars_of(arguments.pattern),
            _remote(arguments),
            arguments.index_dir,
            decode=not arguments.no_decode,
            processes=arguments.processes,
            on_progress=show,
        )
    if arguments.json:
        print(json.dumps({"is_whole": verdict.is_whole, **asdict(verdict)}, indent=1))
    else:
        for note in verdict.notes:
            print(f"note: {printable(note)}")
        for problem in verdict.problems:
            print(f"damaged: {printable(problem)}")
        rows = [(Path(d.shard).name, str(d.number), d.key, d.cause) for d in verdict.damaged]
        _print_table(("shard", "number", "sample", "cause"), rows)
        print(f"{verdict.num_damaged} of {verdict.num_samples} samples are damaged")
    if not verdict.is_whole:
        sys.exit(int(ExitCode.BAD_DATA))


def _stats(arguments: argparse.Namespace) -> None:
    from swinv2_scale.data.inspection.stats import collect_stats
    from swinv2_scale.data.shards.folder_index import tars_of

    pattern, remote = tars_of(arguments.pattern), _remote(arguments)
    with progress_bar("reading") as show:
        stats = collect_stats(
            pattern, remote, arguments.index_dir, arguments.samples or None, arguments.seed, on_progress=show
        )
    if arguments.json:
        print(json.dumps(asdict(stats), indent=1))
    else:
        _print_stats(stats)
    if arguments.sheet is not None:
        from swinv2_scale.data.inspection.contact_sheet import draw_contact_sheet

        draw_contact_sheet(
            pattern,
            remote,
            arguments.index_dir,
            arguments.sheet,
            rows=arguments.rows,
            columns=arguments.columns,
            seed=arguments.seed,
        )
        if not arguments.json:
            print(f"contact sheet: {arguments.sheet}")


def _print_stats(stats: Stats) -> None:
    print(f"{stats.samples} samples in {stats.shards} shards, {stats.bytes / 2**20:,.1f} MiB")
    print(f"from {'all' if stats.looked_at == stats.samples else f'{stats.looked_at} drawn'} samples:")
    if stats.unreadable:
        print(f"  {stats.unreadable} can't be read: swinv2-scale shards verify says which and why")
    _print_counts("members", stats.members, stats.looked_at)
    _print_counts("formats", stats.formats, stats.looked_at)
    _print_counts("modes", stats.modes, stats.looked_at)
    rows = [(name, *(f"{value:,.0f}" for value in numbers)) for name, numbers in stats.quantiles.items()]
    if rows:
        _print_table(("", "least", "5 %", "25 %", "median", "75 %", "95 %", "most"), rows)
    if stats.sizes:
        _print_histogram("short sides, px", list(stats.sizes.items()))
    if stats.labels:
        most = Counter(stats.labels).most_common(_SHOWN_ROWS)
        _print_histogram(f"labels ({len(stats.labels)} of them)", most[:30])
        if len(most) > 30:
            print(
                f"    and {len(stats.labels) - 30} more; the rarest, {most[-1][0]}, has {most[-1][1]}; --json has all"
            )


def _print_counts(title: str, counts: dict[str, int], total: int) -> None:
    if counts:
        shown = (
            f"{printable(name)} {count}" if count != total else f"{printable(name)} (all)"
            for name, count in counts.items()
        )
        print(f"  {title}: {', '.join(shown)}")


def _print_histogram(title: str, counts: list[tuple[str, int]]) -> None:
    print(f"  {title}:")
    width = max(len(printable(name)) for name, _ in counts)
    most = max(count for _, count in counts)
    for name, count in counts:
        print(f"    {printable(name):>{width}} {count:>8} {'#' * round(40 * count / most)}")


def _export(arguments: argparse.Namespace) -> None:
    from swinv2_scale.data.inspection.export import export_folder
    from swinv2_scale.data.shards.folder_index import tars_of

    with progress_bar("writing") as show:
        count = export_folder(
            tars_of(arguments.pattern), _remote(arguments), arguments.index_dir, arguments.destination, on_progress=show
        )
    print(f"{count} samples in {arguments.destination}")


def _remote(arguments: argparse.Namespace) -> RemoteFiles:
    from swinv2_scale.config.run import RemoteConfig
    from swinv2_scale.data.remote.files import RemoteFiles

    return RemoteFiles(RemoteConfig(allowed_commands=tuple(arguments.allow_command)))


def _print_table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows[:_SHOWN_ROWS]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    if len(rows) > _SHOWN_ROWS:
        print(f"and {len(rows) - _SHOWN_ROWS} more")
