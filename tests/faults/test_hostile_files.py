"""Files from somebody who wishes us ill, at every entry point: nothing in them runs, nothing outside is touched.

A payload builds its files in a folder and says what the entry point is given. Whatever it does then, it ends with the
code that is expected, and afterwards: the canary, which every payload would touch, isn't there; no process was started
and no code of the folder ran, by Python's own audit; the file outside is as it was; what was printed commands no
terminal. That torch's and our reading of single files is safe is shown in more depth in test_bad_weights.py (weights),
test_mutants.py (samples), test_pipe.py (commands) and, statically, in contract/test_no_code_from_outside.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from swinv2_scale.cli.evaluate import evaluate
from swinv2_scale.cli.main import main, make_parser
from swinv2_scale.cli.train import finetune, pretrain
from swinv2_scale.config.run import RemoteConfig
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards import manifest
from swinv2_scale.data.shards.folder_index import index_folders
from swinv2_scale.data.shards.manifest import (
    INDEX_DIR,
    INDEX_ENTRY,
    ShardEntry,
    index_folder,
    split_location,
    write_manifest,
)
from swinv2_scale.engine.checkpoint import FileRecord, _digest, manifest_text
from swinv2_scale.engine.resume import versions
from swinv2_scale.weights.api import save_weights
from swinv2_scale.weights.facts import Facts
from tests.support import processes
from tests.support.deadline import within
from tests.support.mutants import encoded, photograph
from tests.support.small_run import LIGHT, metrics, write_config
from tests.unit.weights.small import classifier

DEADLINE_S = 30  # of each attack in this process; the jobs have that of tests/support/processes.py
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
DEEP = "[" * 200_000
PRECIOUS = b"not yours"
#: While an attack goes on: its folder, and what it has started.
_watched: list[tuple[str, list[str]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Starts of programs, and code of a hostile folder, while an attack goes on. An audit hook can't be removed."""
    if not _watched:
        return
    folder, happened = _watched[0]
    is_start = event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pty.spawn")
    if is_start or (event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(folder)):
        happened.append(f"{event} {arguments}")


sys.addaudithook(_audit)


@dataclass(frozen=True)
class Place:
    """Where an attack happens.

    Attributes:
        root: the working folder; what the payload builds.
        outside: a file that isn't the payload's.
        canary: what a payload touches when it runs.
    """

    root: Path
    outside: Path
    canary: Path

    @property
    def command(self) -> str:
        return f"touch {self.canary}"

    @property
    def pickle(self) -> bytes:
        return pickle.dumps(_Payload(self.command), protocol=2)

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


class _Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A folder to work in."""
    for name in ("hostile", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "precious").write_bytes(PRECIOUS)
    monkeypatch.chdir(tmp_path / "hostile")
    return Place(tmp_path / "hostile", tmp_path / "outside" / "precious", tmp_path / "canary")


@contextmanager
def watched(place: Place) -> Iterator[list[str]]:
    """What happens to be started meanwhile. Whatever hangs ends at the deadline."""
    happened: list[str] = []
    _watched.append((str(place.root), happened))
    try:
        with within(DEADLINE_S):
            yield happened
    finally:
        _watched.clear()


def ends_with(entry: str, words: list[object]) -> int:
    """The exit code of an entry point, in this process. Other exceptions than ours come through."""
    words = [str(word) for word in words]
    try:
        if entry.startswith("launch/"):
            script = {"pretrain.py": pretrain, "finetune.py": finetune, "evaluate.py": evaluate}[Path(entry).name]
            return script(words)  # type: ignore[arg-type]
        return main([*entry.split(), *words])  # type: ignore[arg-type]
    except SystemExit as end:
        return int(end.code or 0)


#: (entry point, what it ends with, payload). What a payload returns is given to the entry point.
Attack = tuple[str, int, Callable[[Place], list[object]]]
ATTACKS: list[Attack] = []


def attacks(codes: dict[str, int], words: Callable[[str, Any], list[object]]) -> Callable[[Any], Any]:
    """Register a payload for several entry points, each with its exit code."""

    def register(build: Any) -> Any:
        for entry, code in codes.items():

            def attack(place: Place, entry: str = entry) -> list[object]:
                return words(entry, build(place))

            attack.__name__ = build.__name__
            ATTACKS.append((entry, code, attack))
        return build

    return register


# --- configurations ---------------------------------------------------------------------------------------------------


def config() -> Callable[[Any], Any]:
    def words(entry: str, made: list[object]) -> list[object]:
        first, *overrides = made
        if entry == "submit":
            return [*made, "--nodes", 1, "--gpus-per-node", 1, "--print"]
        if entry == "plan":
            return [*made, "--gpus", 2]
        if entry == "launch/evaluate.py":
            return ["--config", first, "--weights", "run", *overrides]
        training = ["--config", first, "--run-dir", "run", *overrides]
        if entry == "launch":
            return ["deepspeed", "launch/pretrain.py", *training]
        return training if entry.startswith("launch/") else made

    scripts = ("launch/pretrain.py", "launch/finetune.py", "launch/evaluate.py")
    entries = ("config check", "config explain", "doctor", "launch", "plan", *scripts, "submit")
    return attacks(dict.fromkeys(entries, 78), words)


def small(place: Place, **replacements: str) -> Path:
    return write_config(place.root, place.root / "shards", **replacements)


@config()
def python_tags(place: Place) -> list[object]:
    return [small(place, **{"lr: 2.0e-3": f"lr: !!python/object/apply:os.system ['{place.command}']"})]


@config()
def a_python_tag_in_a_key(place: Place) -> list[object]:
    return [place.file("x.yaml", f"? !!python/object/new:os.system ['{place.command}']\n: 1\n")]


@config()
def a_python_tag_in_an_override(place: Place) -> list[object]:
    return [small(place), f"optim.lr=!!python/object/apply:os.system ['{place.command}']"]


@config()
def a_python_tag_in_what_is_extended(place: Place) -> list[object]:
    place.file("base.yaml", f"seed: !!python/object/apply:os.system ['{place.command}']\n")
    small(place)
    return [place.file("x.yaml", "extends: [small.yaml, base.yaml]\n")]


@config()
def a_pickle_and_code_as_what_is_extended(place: Place) -> list[object]:
    place.file("base.py", f"import os; os.system({place.command!r})\n")
    place.file("base.pkl", place.pickle)
    return [place.file("x.yaml", "extends: [base.py, base.pkl]\n")]


@config()
def a_pipe_as_what_is_extended(place: Place) -> list[object]:
    os.mkfifo(place.root / "pipe")
    return [place.file("x.yaml", "extends: pipe\n")]


@config()
def keys_that_command_a_terminal(place: Place) -> list[object]:
    text = f"{small(place).read_text()}{json.dumps(ESCAPE)}: {json.dumps(ESCAPE)}\n"
    return [place.file("x.yaml", text), f"{ESCAPE}={ESCAPE}"]


@config()
def a_billion_laughs(place: Place) -> list[object]:
    return [place.file("x.yaml", "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(30)))]


@attacks({"config check": 78}, lambda entry, made: made)
def brackets_without_end(place: Place) -> list[object]:
    return [place.file("x.yaml", f"a: {DEEP[:20_000]}")]


@attacks({"config check": 0, "config explain": 0, "doctor": 0}, lambda entry, made: made)
def text_that_is_markup(place: Place) -> list[object]:
    return [small(place), f"data.shards_dir={json.dumps(f'[/red]{ESCAPE}')}"]


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe() -> Callable[[Any], Any]:
    def words(entry: str, made: list[object]) -> list[object]:
        return [*made, "--nodes", 1, "--gpus-per-node", 1, "--print"] if entry == "recipe submit" else made

    return attacks(dict.fromkeys((f"recipe {action}" for action in ("check", "run", "submit", "status")), 78), words)


@recipe()
def a_python_tag_in_a_recipe(place: Place) -> list[object]:
    return [place.file("r.yaml", f"stages: !!python/object/apply:os.system ['{place.command}']\n")]


@recipe()
def a_python_tag_in_a_stage_of_a_recipe(place: Place) -> list[object]:
    small(place, **{"lr: 2.0e-3": f"lr: !!python/object/apply:os.system ['{place.command}']"})
    return [place.file("r.yaml", "stages: [{name: a, config: small.yaml}]\n")]


@recipe()
def a_pipe_and_a_device_as_stages_of_a_recipe(place: Place) -> list[object]:
    os.mkfifo(place.root / "pipe")
    stages = ", ".join(f"{{name: {name}, config: {name}}}" for name in ("pipe", "dev"))
    (place.root / "dev").symlink_to("/dev/zero")
    return [place.file("r.yaml", f"stages: [{stages}]\n")]


@recipe()
def stages_whose_names_lead_out_of_the_folder_or_command_a_terminal(place: Place) -> list[object]:
    small(place)
    names = ("../../outside/x", "/x", "a;touch x", "-rf", ESCAPE, "")
    stages = "".join(f"  - {{name: {json.dumps(name)}, config: small.yaml}}\n" for name in names)
    return [place.file("r.yaml", f"{json.dumps(ESCAPE)}: 1\nstages:\n{stages}")]


@recipe()
def overrides_of_a_recipe_for_the_shell_of_another_host(place: Place) -> list[object]:
    """DeepSpeed's pdsh quotes nothing."""
    small(place)
    words = json.dumps([f"data.shards_dir=x$({place.command})", f"data.index_dir=x;{place.command}"])
    return [place.file("r.yaml", f"stages: [{{name: a, config: small.yaml, overrides: {words}}}]\n")]


@recipe()
def overrides_of_a_recipe_that_are_options_or_python(place: Place) -> list[object]:
    small(place)
    words = json.dumps(["--run-dir=/tmp", f"optim.lr=!!python/object/apply:os.system ['{place.command}']"])
    return [place.file("r.yaml", f"stages: [{{name: a, config: small.yaml, overrides: {words}}}]\n")]


# --- weights ----------------------------------------------------------------------------------------------------------


def weights(convert: int = 65, predict: int = 65) -> Callable[[Any], Any]:
    def words(entry: str, path: Path) -> list[object]:
        if entry == "predict":
            return [path, picture(path.parent / "picture.png")]
        if entry == "probe":
            return [path, "--train", "train.tar", "--validation", "validation.tar"]
        return [path, "out", "--to" if entry == "convert" else "--format", "hf"]

    return attacks({"convert": convert, "predict": predict, "probe": 65}, words)  # there are no shards


def picture(path: Path) -> Path:
    path.write_bytes(encoded(photograph(1), "PNG"))
    return path


def good_folder(place: Place, facts: Facts | None = None) -> Path:
    save_weights(classifier(), place.root / "hf", "hf", facts=facts)
    return place.root / "hf"


@weights()
def a_pickle_under_each_name(place: Place) -> Path:
    folder = place.root / "w"
    folder.mkdir()
    torch.save({"model": {"a": torch.ones(1)}, "b": _Payload(place.command)}, folder / "pytorch_model.bin")
    return folder


@weights()
def a_pickle_called_safetensors(place: Place) -> Path:
    return place.file("w.safetensors", place.pickle)


@weights()
def a_plain_pickle(place: Place) -> Path:
    return place.file("w.pth", place.pickle)


@weights()
def a_link_to_a_pickle_outside(place: Place) -> Path:
    (place.outside.parent / "w.bin").write_bytes(place.pickle)
    (place.root / "w.bin").symlink_to("../outside/w.bin")
    return place.root / "w.bin"


@weights()
def an_index_that_leads_outside(place: Place) -> Path:
    save_weights(classifier(), place.outside.parent / "w.safetensors")
    folder = good_folder(place)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"norm.weight": "../../outside/w.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@weights()
def an_index_without_end(place: Place) -> Path:
    folder = good_folder(place)
    (folder / "model.safetensors.index.json").write_text(DEEP)
    return folder


@weights()
def a_description_without_end(place: Place) -> Path:
    return safetensors(place, {"__metadata__": {"swinv2_scale": DEEP}})


@weights()
def names_that_command_a_terminal(place: Place) -> Path:
    return safetensors(place, {ESCAPE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})


def safetensors(place: Place, header: dict[str, Any]) -> Path:
    text = json.dumps({"layers.0.blocks.0.x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}} | header)
    return place.file("w.safetensors", struct.pack("<Q", len(text)) + text.encode() + bytes(4))


@weights()
def a_pipe_for_a_file(place: Place) -> Path:
    os.mkfifo(place.root / "w.pth")
    return place.root / "w.pth"


@weights(convert=0, predict=0)
def a_folder_with_code_beside_good_weights(place: Place) -> Path:
    """``auto_map`` is how transformers is told to run a file of the folder."""
    labels = (ESCAPE, "$(touch x)", "[/red]", "é\n", "e")
    folder = good_folder(place, Facts(labels=labels))
    about = json.loads((folder / "config.json").read_text())
    about |= {"auto_map": {"AutoModel": "modeling.Model"}, "trust_remote_code": True, "custom_pipelines": {"x": "y"}}
    (folder / "config.json").write_text(json.dumps(about))
    for name in ("modeling.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(f"import os; os.system({place.command!r})\n")
    (folder / "pytorch_model.bin").write_bytes(place.pickle)
    return folder


# --- runs and their checkpoints ---------------------------------------------------------------------------------------

FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt", "random_states_rank_0.pt")


def forged_run(place: Place, step: int = 2, folder: Path | None = None, saved: str = "") -> Path:
    """A run whose checkpoint's every file is a pickle with code; whose manifest has the right hashes of them."""
    run = place.root / "run"
    folder = folder or run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    state = {"step": step, "config": {"engine.precision": saved, "engine.zero_stage": saved}}
    for name in ("state.json", *FILES, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        data = json.dumps(state).encode() if name == "state.json" else place.pickle
        (folder / name).write_bytes(data)
        records.append(FileRecord(name, len(data), hashlib.sha256(data).hexdigest()))
    text = manifest_text(step, 1, records)
    if saved:
        data = json.loads(text)
        del data["sha256"]
        data["saved"] = saved
        text = json.dumps({**data, "sha256": _digest(data)})
    (folder / "manifest.json").write_text(text)
    return run


def runs(**codes: int) -> Callable[[Any], Any]:
    """export, predict, status, the actions of ``checkpoint``; status, list, prune end with 0 unless said, others 65."""
    usual = {"export": 65, "predict": 65, "status": 0, "list": 0, "verify": 65, "prune": 0, "consolidate": 65}
    names = {name: name if name in ("export", "predict", "status") else f"checkpoint {name}" for name in usual}

    def words(entry: str, run: Path) -> list[object]:
        more = {"export": ["x", "--format", "hf"], "predict": ["x.png"], "checkpoint consolidate": ["x.safetensors"]}
        return [run, *more.get(entry, [])]

    return attacks({names[name]: code for name, code in (usual | codes).items()}, words)


@runs(verify=0)
def a_run_of_pickles(place: Place) -> Path:
    return forged_run(place)


@runs(verify=0)
def a_run_that_commands_a_terminal(place: Place) -> Path:
    return forged_run(place, saved=f"[/red]{ESCAPE}")


@runs()
def a_checkpoint_of_links(place: Place) -> Path:
    run = forged_run(place)
    for path in run.glob("checkpoints/*/*.pt"):
        path.rename(place.outside.with_name(path.name))
        path.symlink_to(f"../../../../outside/{path.name}")
    return run


@runs(list=65, prune=65)
def a_checkpoint_that_names_files_outside(place: Place) -> Path:
    run = forged_run(place)
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    data = json.loads(path.read_text())
    del data["sha256"]
    data["files"][0]["name"] = "../../../../outside/precious"
    path.write_text(json.dumps({**data, "sha256": _digest(data)}))
    return run


@attacks({"checkpoint prune": 0}, lambda entry, run: [run, "--keep", 2])
def a_checkpoint_that_is_a_link_to_a_folder_outside(place: Place) -> Path:
    """Its name goes, its files don't."""
    for step in (7, 8):
        run = forged_run(place, step)
    forged_run(place, 3, folder=place.outside.parent)
    (run / "checkpoints" / "step-00000003").symlink_to(place.outside.parent)
    return run


@attacks({"status": 0, "stop": 78}, lambda entry, run: [run])
def a_run_whose_records_command_a_terminal(place: Place) -> Path:
    run = small(place, **{"train: embedded:": f"train: {json.dumps(ESCAPE)} # "}).rename(
        place.file("run/config.yaml", "")
    )
    life = {"started": ESCAPE, "life": ESCAPE, "host": ESCAPE, "command": [ESCAPE, "[/red]"], "from_step": 1}
    for line in (life, {"ended": ESCAPE, "life": ESCAPE, "exit_code": 85, "why": f"[/red]{ESCAPE}"}):
        with (run.parent / "lives.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    place.file("run/.lock", f"pid 1 on {ESCAPE}, since")
    place.file("run/metrics.jsonl", json.dumps({"step": 1, "loss": ESCAPE}))
    return run.parent


@attacks({"predict": 65}, lambda entry, words: words)
def images_that_are_programs(place: Place) -> list[object]:
    """Ghostscript is what Pillow starts for these, under whatever name they have."""
    return [good_folder(place), place.file("x.png", f"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%{place.command}) (w) file\n")]


@attacks({"predict": 65}, lambda entry, words: words)
def an_array_that_is_a_pickle(place: Place) -> list[object]:
    buffer = BytesIO()
    np.save(buffer, np.array([_Payload(place.command)], object), allow_pickle=True)
    return [good_folder(place), place.file("x.npy", buffer.getvalue())]


@attacks({"predict": 65}, lambda entry, words: words)
def an_image_that_is_a_pipe(place: Place) -> list[object]:
    os.mkfifo(place.root / "x.png")
    return [good_folder(place), place.root]


# --- shards -----------------------------------------------------------------------------------------------------------


def shards(**codes: int) -> Callable[[Any], Any]:
    """index, verify, stats, export; 0 unless said."""

    def words(entry: str, pattern: object) -> list[object]:
        more: dict[str, list[object]] = {"shards stats": ["--sheet", "sheet.png"], "shards export": ["back"]}
        return [pattern, *more.get(entry, ["--processes", 1])]

    return attacks({f"shards {name}": codes.get(name, 0) for name in ("index", "verify", "stats", "export")}, words)


Member = tuple[str | tarfile.TarInfo, bytes]


def shard(place: Place, members: list[Member], index: bool = True) -> Path:
    folder = place.root / "s"
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if info.type != tarfile.REGTYPE else len(data)
            tar.addfile(info, BytesIO(data))
    if index:
        index_folders([str(folder / "0.tar")], RemoteFiles(RemoteConfig()), skip_damaged=True)
    return folder


def sample(key: str) -> list[Member]:
    return [(f"{key}.png", encoded(photograph(len(key)), "PNG")), (f"{key}.cls", b"0")]


def pickled(place: Place, key: str) -> list[Member]:
    kinds = ("pyd", "pkl", "pickle", "pth", "meta.pkl", "PTH.TAR", "npz", "pt", "py")
    return [(f"{key}.{kind}", place.pickle) for kind in kinds]


@shards()
def pickles_beside_images(place: Place) -> Path:
    return shard(place, [member for key in ("a", "b") for member in [*sample(key), *pickled(place, key)]])


@shards()
def keys_for_a_shell_and_a_terminal(place: Place) -> Path:
    keys = (f"a$({place.command})", f"b;{place.command};", "c`touch canary`", f"d{ESCAPE}", "e\nerror: f", "--help")
    return shard(place, [member for key in keys for member in sample(key.replace("/", "_"))])


@shards(export=65)
def names_that_lead_outside(place: Place) -> Path:
    return shard(place, [*sample("../outside/precious"), *sample(str(place.outside))])


@shards(index=0, verify=65, stats=65, export=65)
def a_manifest_that_is_a_pipe(place: Place) -> Path:
    folder = shard(place, sample("a"), index=False)
    os.mkfifo(folder / "manifest.json")
    return folder


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"z{kind.decode()}.png")
    info.type, info.linkname = kind, target
    return info


@shards(index=65)
def links_and_devices(place: Place) -> Path:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    return shard(place, [*sample("a"), *((special(kind, str(place.outside)), b"") for kind in kinds)])


@shards(verify=65)
def a_clip_that_names_a_file_outside(place: Place) -> Path:
    """ffmpeg takes a list of files for a clip, and opens them."""
    from tests.unit.data.test_preparation import CLIP

    place.file("outside.mp4", CLIP)
    return shard(place, [("a.mp4", b"ffconcat version 1.0\nfile outside.mp4\n"), ("a.cls", b"0")])


@shards(verify=65, stats=65, export=65)
def a_manifest_that_leads_outside(place: Place) -> Path:
    """Where a folder outside has shards and a manifest, their samples would be ours."""
    shard(place, sample("a")).rename(place.outside.parent / "s")
    folder = shard(place, sample("a"))
    return forged_manifest(
        folder, lambda data: data["shards"].append(data["shards"][0] | {"name": "../../outside/s/0.tar"})
    )


@shards(verify=65, stats=65, export=65)
def a_manifest_of_other_types(place: Place) -> Path:
    return forged_manifest(shard(place, sample("a")), lambda data: data["shards"][0].update(samples="9", bytes=None))


@shards(verify=65, stats=65, export=65)
def a_schema_of_other_types(place: Place) -> Path:
    return forged_manifest(shard(place, sample("a")), lambda d: d["schema"].update(left_out=["x"], classes={"a": 1}))


@shards()
def classes_that_command_a_terminal(place: Place) -> Path:
    return forged_manifest(shard(place, sample("a")), lambda data: data["schema"].update(classes=[ESCAPE]))


def forged_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Whoever changes a manifest can make its digest right, too."""
    data = json.loads((folder / "manifest.json").read_text())
    del data["digest"]
    change(data)
    (folder / "manifest.json").write_text(json.dumps({**data, "digest": manifest._digest(data)}, indent=1))
    return folder


@shards(verify=65, stats=65, export=65)
def a_manifest_without_end(place: Place) -> Path:
    folder = shard(place, sample("a"))
    (folder / "manifest.json").write_text(DEEP)
    return folder


@shards(index=78, verify=78, stats=78, export=78)
def a_command_for_a_shard(place: Place) -> str:
    """With a manifest of its own in the working folder, where those of commands are looked for."""
    location = f"pipe:{place.command} x.tar"
    apart = index_folder(INDEX_DIR, split_location(location)[0])
    apart.mkdir(parents=True)
    write_manifest(apart, [ShardEntry("x.tar", 1, 1024, "0" * 64)], "a test")
    (apart / "x.tar.index").write_bytes(INDEX_ENTRY.pack(0, 1024, 0))
    return location


@attacks({"shards index": 65}, lambda entry, folder: [folder])
def a_device_without_end(place: Place) -> Path:
    (place.root / "s").mkdir()
    (place.root / "s" / "0.tar").symlink_to("/dev/zero")
    return place.root / "s"


@attacks({"shards index": 0}, lambda entry, folder: [folder, "--processes", 1])
def links_under_the_names_that_are_written(place: Place) -> Path:
    folder = shard(place, sample("a"), index=False)
    for name in ("0.tar.index.part", "0.tar.index", "manifest.json.part", "manifest.json"):
        (folder / name).symlink_to(place.outside)
    return folder


def write(code: int, *options: object) -> Callable[[Any], Any]:
    return attacks({"shards write": code}, lambda entry, source: [source, "dst", "--processes", 1, *options])


@write(0)
def a_folder_of_loops_pickles_and_code(place: Place) -> Path:
    for name in ("a", f"b{ESCAPE}", "c"):
        picture(place.file(f"src/{name}/x.png", b""))
    for name in ("a/x.pkl", "a/x.py", "a/conftest.py", "__init__.py"):
        place.file(f"src/{name}", place.pickle)
    (place.root / "src" / f"empty{ESCAPE}").mkdir()
    (place.root / "src" / "c" / "loop").symlink_to("..")
    picture(place.root / "src" / "c" / "--checkpoint-action=exec=sh x.png")
    picture(place.root / "src" / "c" / (f"$({place.command}).png".replace("/", "_")))
    return place.root / "src"


@write(65)
def a_link_to_itself(place: Place) -> Path:
    place.file("src/a.txt", b"").with_name("x.png").symlink_to("x.png")
    return place.root / "src"


@write(65)
def an_image_that_is_a_program(place: Place) -> Path:
    place.file("src/x.png", f"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%{place.command}) (w) file\n")
    return place.root / "src"


@write(65)
def an_image_that_is_a_pipe_too(place: Place) -> Path:
    os.mkfifo(place.file("src/x.png", b"").with_name("y.png"))
    return place.root / "src"


@write(65, "--no-verify")
def an_image_that_is_a_device(place: Place) -> Path:
    place.file("src/notes.txt", b"").with_name("y.npy").symlink_to("/dev/zero")
    return place.root / "src"


@write(65, "--from", "csv")
def a_table_of_commands(place: Place) -> Path:
    return place.file("t.csv", f"path,label\n$({place.command}).png,{ESCAPE}\n|{place.command} .png,b\n")


@write(65, "--from", "coco")
def annotations_that_lead_outside(place: Place) -> Path:
    picture(place.outside.with_name("x.png"))
    image = {"id": 1, "file_name": "../../../outside/x.png", "width": 1, "height": 1}
    data = {"images": [image], "annotations": [], "categories": []}
    place.file("c/annotations/instances_train2017.json", json.dumps(data))
    (place.root / "c" / "train2017").mkdir()
    return place.root / "c"


@write(65, "--from", "coco")
def annotations_without_end(place: Place) -> Path:
    place.file("c/annotations/instances_train2017.json", DEEP)
    return place.root / "c"


@write(73, "--resume")
def an_interrupted_job_that_leads_outside(place: Place) -> Path:
    """What isn't finished in ``shards/`` is deleted when a job goes on."""
    (place.root / "dst.part").mkdir()
    (place.root / "dst.part" / "shards").symlink_to(place.outside.parent)
    picture(place.file("src/x.png", b""))
    return place.root / "src"


@attacks({"kernels build": 78, "kernels status": 78}, lambda entry, words: words)
def a_word_that_commands_a_terminal(place: Place) -> list[object]:
    return [f"[/red]{ESCAPE}"]


@attacks({"models": 0}, lambda entry, words: words)
def a_folder_full_of_code_to_stand_in(place: Place) -> list[object]:
    for name in ("yaml.py", "rich.py", "sitecustomize.py", "conftest.py", ".env", ".deepspeed_env", "setup.cfg"):
        place.file(name, f"import os; os.system({place.command!r})\n")
    return []


# --- the attacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "code", "attack"), ATTACKS, ids=[f"{a[0]}-{a[2].__name__}" for a in ATTACKS])
def test_f13_nothing_runs_and_nothing_outside_is_touched(
    place: Place, capsys: pytest.CaptureFixture[str], entry: str, code: int, attack: Callable[[Place], list[object]]
) -> None:
    words = attack(place)
    versions()  # asks git, once a process
    capsys.readouterr()
    with watched(place) as happened:
        found = ends_with(entry, words)
    said = "".join(capsys.readouterr())
    assert found == code, said
    assert_nothing_happened(place, said)
    assert happened == []


def assert_nothing_happened(place: Place, said: str) -> None:
    assert not place.canary.exists()
    assert place.outside.read_bytes() == PRECIOUS
    assert not place.outside.is_symlink()
    assert sorted({c for c in said if not c.isprintable() and c != "\n"}) == []
    assert "Traceback" not in said


def test_f13_every_entry_point_is_attacked() -> None:
    """A new command needs an attack here."""
    scripts = {f"launch/{path.name}" for path in (processes.REPOSITORY / "launch").glob("*.py")}
    assert {entry for entry, _, _ in ATTACKS} == scripts | set(commands_of(make_parser()))


def commands_of(parser: argparse.ArgumentParser, before: str = "") -> Iterator[str]:
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not choices:
        yield before.strip()
    for name, below in (item for choice in choices for item in choice.items()):
        yield from commands_of(below, f"{before} {name}")


def test_f13_the_canary_is_alive(place: Place) -> None:
    """The payloads do run where somebody lets them."""

    def ran() -> bool:
        is_there = place.canary.exists()
        place.canary.unlink(missing_ok=True)
        return is_there

    pickle.loads(place.pickle)  # noqa: S301
    assert ran()
    yaml.unsafe_load(f"!!python/object/apply:os.system ['{place.command}']")
    assert ran()
    subprocess.run(["bash", "-c", f": $({place.command})"], check=True)
    assert ran()
    place.file("x.py", "")
    with watched(place) as happened:
        subprocess.run(["true"], check=True)
        runpy.run_path(str(place.root / "x.py"))
    assert len(happened) == 2


# --- whole jobs -------------------------------------------------------------------------------------------------------


def test_f13_a_job_trains_on_hostile_shards_in_a_hostile_run_directory(place: Place) -> None:
    keys = (f"a$({place.command})".replace("/", "_"), f"b{ESCAPE}", "../outside/precious", "d\nerror: x")
    members = [member for key in keys for member in [*sample(key), *pickled(place, key)]]
    folder = shard(place, [*members, (special(tarfile.SYMTYPE, str(place.outside)), b"")])
    place.file("run/config.yaml", f"seed: !!python/object/apply:os.system ['{place.command}']\n")
    for name in ("metrics", "quarantine", "lives"):
        lines = (DEEP, '{"step": ' + "9" * 5000 + "}", '{"step": 1, "use": []}', '{"step": 1, "use": [], "epoch": {}')
        place.file(f"run/{name}.jsonl", "\n".join((*lines, '{"step": 0}', json.dumps(ESCAPE), "\0\xff", "")))
    small(place, **{"embedded:fashion-mnist/validation": str(folder), "validation: ": "index_dir: "})
    arguments = (f"data.train={folder}/*.tar", "data.global_batch_size=4", "evaluation.every_steps=0", "--steps", 2)
    run = place.root / "run"
    finished = processes.pretrain("--config", place.root / "small.yaml", "--run-dir", run, *LIGHT, *arguments)
    assert finished.code == 0, finished.output
    assert_nothing_happened(place, finished.output)
    assert [row["step"] for row in metrics(run)][-2:] == [1, 2]
    assert_nothing_happened(place, (run / "log" / "rank-0.log").read_text())


@pytest.mark.parametrize(
    ("payload", "code"), [(a_link_to_a_pickle_outside, 65), (a_run_of_pickles, 65)], ids=["file", "run"]
)
def test_f13_a_job_starts_from_no_hostile_weights(place: Place, payload: Any, code: int, shards_dir: Path) -> None:
    assert_refused(place, write_config(place.root, shards_dir), code, f"init_from={payload(place)}")


def test_f13_a_job_starts_no_command_for_its_shards(place: Place, shards_dir: Path) -> None:
    train = f"data.train=pipe:{place.command} x.tar"
    assert_refused(place, write_config(place.root, shards_dir), 78, train)


@pytest.fixture
def shards_dir(request: pytest.FixtureRequest) -> Path:
    """The session's embedded shards; here ``shards`` is a payload's decorator."""
    path: Path = request.getfixturevalue("shards")
    return path


def assert_refused(place: Place, path: Path, code: int, *arguments: str) -> None:
    finished = processes.pretrain("--config", path, "--run-dir", place.root / "new", *LIGHT, *arguments)
    assert finished.code == code, finished.output
    assert finished.output.count("\nerror: ") == 1
    assert_nothing_happened(place, finished.output)
