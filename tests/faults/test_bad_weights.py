"""Bad files of weights: one clear typed error, no code run, the model as it was, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from swinv2_scale.errors import ExitCode, OutputError, ScaleError, WeightsError
from swinv2_scale.weights.api import load_weights, save_weights
from swinv2_scale.weights.facts import Facts
from swinv2_scale.weights.read import open_weights
from swinv2_scale.weights.write import write_weights
from tests.unit.weights.small import FOUR_STAGES, classifier, named, save_pickle, save_state, simmim, state

torch.set_num_threads(1)


def refused(path: Path, model: nn.Module | None = None, **options: Any) -> str:
    """The error's text, after looking that it is one, of the right type, and left the model alone."""
    model = classifier() if model is None else model
    before = state(model)
    with pytest.raises(WeightsError) as refusal:
        load_weights(model, path, **options)
    assert refusal.value.exit_code == ExitCode.BAD_DATA
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    return str(refusal.value)


# --- files that are no weights ----------------------------------------------------------------------------------------


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere.pth'}: no such file" in refused(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"PK\x03\x04",
        b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9\n",
        b"\xff\xd8\xff\xe0 a JPEG" * 50,
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 7) + b'{"a": 3',
    ],
    ids=[
        "empty",
        "one byte",
        "zip magic",
        "HTML",
        "Git LFS pointer",
        "picture",
        "huge header",
        "no tensor",
        "bad JSON",
    ],
)
def test_a_file_that_holds_no_weights_is_one_typed_error_with_its_name(
    content: bytes, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert str(path) in refused(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_web_page_in_place_of_a_file_is_called_one(suffix: str, tmp_path: Path) -> None:
    """What a download of a moved file leaves: copying it again, the usual advice, gives the same page."""
    path = tmp_path / f"model{suffix}"
    path.write_text("<!DOCTYPE html>\n<html><body>Sign in to continue</body></html>")
    assert "HTML" in refused(path)


@pytest.mark.parametrize("content", [b"\0", b"version https://git-lfs.github.com/spec/v1\n", pickle.dumps({"a": 1})])
def test_the_error_does_not_pass_on_torchs_text_about_its_own_options(content: bytes, tmp_path: Path) -> None:
    """To look up ``weights_only`` and set it to False is the one thing not to do with a file like this."""
    (tmp_path / "x.pth").write_bytes(content)
    assert "weights_only" not in refused(tmp_path / "x.pth")


def test_an_unknown_suffix_says_which_are_known(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    text = refused(tmp_path / "model.onnx")
    assert all(suffix in text for suffix in (".safetensors", ".pth", ".pt", ".bin"))


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    text = refused(tmp_path)
    assert "README.md" in text
    assert "model.safetensors" in text


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_truncated_pickle_is_one_typed_error_wherever_it_is_cut(zipped: bool, tmp_path: Path) -> None:
    path = save_state_as(tmp_path / "x.pth", zipped)
    whole = path.read_bytes()
    for share in (0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        assert str(path) in refused(path)


def save_state_as(path: Path, zipped: bool) -> Path:
    return save_pickle(state(classifier()), path, _use_new_zipfile_serialization=zipped)


def test_a_truncated_safetensors_file_is_one_typed_error_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_weights(classifier(), path)
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, 2000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        text = refused(path)
        assert str(path) in text
        assert "again" in text  # copy or download it again


def test_a_file_with_bytes_behind_its_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_weights(classifier(), path)
    path.write_bytes(path.read_bytes() + b"\0")
    assert str(path) in refused(path)


@pytest.mark.parametrize("kind", ["x.safetensors", "x.pth", "old.pth"])
def test_damaged_bytes_are_a_typed_error_or_other_weights_but_never_a_crash(kind: str, tmp_path: Path) -> None:
    """600 files with one to five wrong bytes, most of them in the part that says what is where."""
    model = classifier(depths=(1, 1), embed_dim=4, num_heads=(1, 2))
    path = tmp_path / kind
    if kind == "old.pth":
        save_pickle(state(model), path, _use_new_zipfile_serialization=False)
    else:
        save_weights(model, path, "microsoft" if kind == "x.pth" else "native")
    whole = path.read_bytes()
    chooser = random.Random(0)
    crashes = set()
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(chooser.choice((1, 1, 2, 5))):
            place = chooser.choice((chooser.randrange(3000), len(whole) - 1 - chooser.randrange(3000)))
            damaged[place] = chooser.randrange(256)
        path.write_bytes(damaged)
        try:
            load_weights(model, path)
        except WeightsError:
            pass
        except Exception as error:
            crashes.add(f"{type(error).__name__}: {error}"[:100])
    assert crashes == set()


# --- pickles with code ------------------------------------------------------------------------------------------------


class Payload:
    """Runs a command when it is unpickled by anything that lets it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize(
    ("how", "suffix"),
    [("zip", ".pth"), ("zip", ".pt"), ("zip", ".bin"), ("before torch 1.6", ".pth"), ("plain pickle", ".pth")],
)
def test_code_in_a_pickle_does_not_run_and_the_error_says_so(how: str, suffix: str, tmp_path: Path) -> None:
    data = {"model": state(classifier()), "extra": Payload(f"touch {tmp_path / 'it_ran'}")}
    path = tmp_path / f"x{suffix}"
    if how == "plain pickle":
        path.write_bytes(pickle.dumps({"extra": data["extra"]}, protocol=2))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=how == "zip")
    text = refused(path)
    assert not (tmp_path / "it_ran").exists()
    assert "run code" in text
    assert "system" in text


def test_code_in_one_of_the_files_of_a_folder_does_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save_weights(classifier(), folder, "hf")
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1), "b": Payload(f"touch {tmp_path / 'it_ran'}")}, folder / "part.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "part.bin"}}))
    refused(folder)
    assert not (tmp_path / "it_ran").exists()


def test_a_class_under_the_name_of_one_that_trainers_leave_behind_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CfgNode and Namespace are let in by name: a module of that name on the path must not be."""
    package = tmp_path / "yacs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "config.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\nclass CfgNode(dict): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    # GLOBAL yacs.config CfgNode, called without arguments, as the only entry of a dictionary.
    body = b"\x80\x02}X\x06\x00\x00\x00configcyacs.config\nCfgNode\n)\x81s."
    torch.save({}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pth").read_bytes()
    empty = b"\x80\x02}q\x00."
    assert whole.count(empty) == 1
    (tmp_path / "x.pth").write_bytes(whole.replace(empty, body))
    assert "no tensors" in refused(tmp_path / "x.pth")
    assert not (tmp_path / "it_ran").exists()


def test_a_whole_pickled_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    text = refused(save_pickle(classifier(), tmp_path / "x.pth"))
    assert "state_dict" in text


@pytest.mark.parametrize("value", [np.float64(81.3), Path("/data")], ids=["numpy number", "path"])
def test_a_harmless_object_beside_the_weights_is_named_so_that_its_owner_can_take_it_out(
    value: Any, tmp_path: Path
) -> None:
    text = refused(save_pickle({"model": state(classifier()), "best": value}, tmp_path / "x.pth"))
    assert "numpy" in text or "Path" in text
    assert "state_dict" in text


@pytest.mark.parametrize("data", [[1, 2], 3.5, "text", torch.ones(3), {"epoch": 3}, {}], ids=repr)
def test_a_pickle_without_named_tensors_is_refused(data: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "x.pth") in refused(save_pickle(data, tmp_path / "x.pth"))


# --- other models -----------------------------------------------------------------------------------------------------


def shaped(*shapes: tuple[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes}


STRANGERS = {
    "Swin V1": shaped(
        ("patch_embed.proj.weight", (96, 3, 4, 4)),
        ("layers.0.blocks.0.attn.relative_position_bias_table", (169, 3)),
        ("layers.0.blocks.0.attn.qkv.weight", (288, 96)),
    ),
    "Vision Transformer": shaped(
        ("cls_token", (1, 1, 384)), ("pos_embed", (1, 197, 384)), ("blocks.0.attn.qkv.weight", (1152, 384))
    ),
    "convolutional": shaped(
        ("conv1.weight", (64, 3, 7, 7)), ("bn1.running_mean", (64,)), ("layer1.0.conv1.weight", (64, 64, 1, 1))
    ),
    "swinv2_cr": shaped(
        ("patch_embed.proj.weight", (96, 3, 4, 4)),
        ("stages.0.blocks.0.attn.logit_scale", (3,)),
        ("stages.0.blocks.0.attn.meta_mlp.fc1.weight", (384, 2)),
    ),
    "no Swin Transformer": shaped(("weight", (3, 3))),
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_another_architecture_are_called_what_they_seem_to_be(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save(STRANGERS[kind], path)
    else:
        save_file(STRANGERS[kind], path)
    text = refused(path)
    assert kind in text
    assert sorted(STRANGERS[kind])[0] in text


@pytest.mark.parametrize("style", ["native", "hf", "timm", "microsoft", "torchvision"])
def test_another_width_is_told_with_both_shapes_and_what_the_file_is(style: Any, tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / named("x", style), style)
    text = refused(tmp_path / named("x", style), classifier(embed_dim=24))
    assert "patch_embed.proj.weight: (12, 3, 4, 4) in the file, (24, 3, 4, 4) in the model" in text
    assert "embed_dim 12" in text
    assert "embed_dim 24" in text
    assert "more" in text
    assert text.count("\n") < 10


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"depths": (2, 3)}, "layers.1.blocks.1.attn.logit_scale: not in the file"),
        ({"depths": (1, 1)}, "layers.0.blocks.1.attn.qkv.weight: (36, 12) in the file, not in the model"),
        ({"num_heads": (4, 4)}, "logit_scale: (2, 1, 1) in the file, (4, 1, 1) in the model"),
        ({"patch_size": 2}, "patch_embed.proj.weight: (12, 3, 4, 4) in the file, (12, 3, 2, 2) in the model"),
        ({"mlp_ratio": 2.0}, "mlp.fc1.weight: (48, 12) in the file, (24, 12) in the model"),
        ({"depths": (2, 1, 1), "num_heads": (2, 4, 4)}, "layers.1.downsample.reduction.weight: not in the file"),
        ({"extra_norm_every": 2}, "layers.0.blocks.1.norm3.weight: not in the file"),
    ],
    ids=str,
)
def test_another_shape_is_told_by_the_first_names_that_differ(
    fields: dict[str, Any], fragment: str, tmp_path: Path
) -> None:
    save_weights(classifier(), tmp_path / "x.safetensors")
    assert fragment in refused(tmp_path / "x.safetensors", classifier(**fields))


@pytest.mark.parametrize(
    ("fields", "words"), [({"patch_size": 2}, "patch_size 4"), ({"mlp_ratio": 2.0}, "mlp_ratio 4")]
)
def test_the_fields_that_differ_are_among_those_that_the_error_tells(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """``create the model with those values`` helps only where the value that differs is one of them."""
    save_weights(classifier(), tmp_path / "x.safetensors")
    assert words in refused(tmp_path / "x.safetensors", classifier(**fields))


def test_a_published_shape_is_called_by_its_name(tmp_path: Path) -> None:
    tiny = classifier(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), num_classes=0, window_size=2)
    assert "swinv2_tiny" in refused(save_state(tiny, tmp_path / "x.pth"))


def test_a_shape_that_was_never_published_is_not_called_by_the_name_of_one_that_was(tmp_path: Path) -> None:
    """A model of width 12 and two stages is no tiny; the variant of the library's default says nothing."""
    text = refused(save_state(classifier(), tmp_path / "x.pth"), classifier(embed_dim=24))
    assert "seems to be a swinv2_tiny" not in text


def test_missing_and_unknown_names_are_counted_and_listed(tmp_path: Path) -> None:
    tensors = state(classifier())
    del tensors["layers.0.blocks.1.attn.q_bias"], tensors["norm.weight"]
    tensors |= {"layers.0.blocks.0.attn.qkv.bias": torch.zeros(36), "neck.weight": torch.zeros(2)}
    text = refused(save_pickle(tensors, tmp_path / "x.pth"))
    assert "2 missing: layers.0.blocks.1.attn.q_bias, norm.weight" in text
    assert "2 unknown: layers.0.blocks.0.attn.qkv.bias, neck.weight" in text


def test_half_of_a_head_is_refused(tmp_path: Path) -> None:
    tensors = state(classifier())
    del tensors["head.bias"]
    assert "head.bias" in refused(save_pickle(tensors, tmp_path / "x.pth"))


def test_a_file_without_a_whole_stage_is_refused(tmp_path: Path) -> None:
    tensors = {name: value for name, value in state(classifier()).items() if not name.startswith("layers.0.blocks")}
    assert "layers.0" in refused(save_pickle(tensors, tmp_path / "x.pth"))


def test_a_patch_convolution_for_video_is_another_model(tmp_path: Path) -> None:
    tensors = {**state(classifier()), "patch_embed.proj.weight": torch.zeros(12, 3, 2, 4, 4)}
    path = save_pickle(tensors, tmp_path / "x.pth")
    assert "(12, 3, 2, 4, 4)" in refused(path)


@pytest.mark.parametrize(
    "name", ["norm.weight", "layers.0.blocks.0.mlp.fc1.weight", "layers.0.blocks.0.attn.logit_scale"]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 3, 3, 3, 3)], ids=str)
def test_a_tensor_of_any_other_shape_is_one_typed_error(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = save_pickle({**state(classifier()), name: torch.zeros(shape)}, tmp_path / "x.pth")
    assert name in refused(path)


@pytest.mark.parametrize(
    "table",
    [torch.zeros(3), torch.zeros(()), torch.zeros(1, 7, 7, 0), torch.full((1, 7, 7, 2), torch.nan)],
    ids=["one axis", "no axis", "empty", "NaN"],
)
def test_tables_of_offsets_that_make_no_sense_do_not_decide_about_windows(table: Tensor, tmp_path: Path) -> None:
    tables = {f"layers.{stage}.blocks.0.attn.relative_coords_table": table for stage in range(2)}
    path = save_pickle({**state(classifier()), **tables}, tmp_path / "x.pth")
    try:
        found = load_weights(classifier(), path).pretrained_window_sizes
    except WeightsError:
        return
    assert found == (4, 4)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_values_that_are_no_numbers_are_refused_by_name(value: float, tmp_path: Path) -> None:
    tensors = state(classifier())
    tensors["layers.1.blocks.0.mlp.fc2.bias"][3] = value
    path = save_pickle(tensors, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"layers\.1\.blocks\.0\.mlp\.fc2\.bias holds NaN or infinity"):
        load_weights(classifier(), path)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(24, dtype=torch.complex64),
        torch.ones(24, dtype=torch.int8),
        torch.ones(24).to_sparse(),
        torch.ones(24, device="meta"),
    ],
    ids=["complex", "integer", "sparse", "without values"],
)
def test_tensors_that_are_no_plain_floating_point_numbers_are_refused(value: Tensor, tmp_path: Path) -> None:
    """A quantised file's integers are not its weights; a complex number's imaginary part would be lost in silence."""
    path = save_pickle({**state(classifier()), "norm.weight": value}, tmp_path / "x.pth")
    assert "norm.weight" in refused(path)


# --- Hugging Face's folders -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_weights(classifier(), tmp_path / "hf", "hf")
    return tmp_path / "hf"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_missing_configuration_says_what_it_is_needed_for_and_where_to_put_it(folder: Path) -> None:
    (folder / "config.json").unlink()
    text = refused(folder)
    assert "config.json" in text
    assert "window" in text
    assert str(folder) in text.splitlines()[-1]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\0"], ids=repr)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_damaged_configuration_is_named(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    assert name in refused(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", None),
        ("image_size", "large"),
        ("image_size", [1, 2, 3]),
        ("window_size", -1),
        ("window_size", 0),
        ("pretrained_window_sizes", [4]),
        ("pretrained_window_sizes", [-4, 4]),
        ("pretrained_window_sizes", 4),
        ("hidden_act", "relu"),
        ("use_absolute_embeddings", True),
        ("qkv_bias", False),
        ("layer_norm_eps", 1e-12),
        ("id2label", {"zero": "a"}),
        ("id2label", ["a", "b"]),
    ],
)
def test_a_configuration_that_cannot_be_is_one_typed_error_naming_the_field(
    field: str, value: Any, folder: Path
) -> None:
    change(folder / "config.json", **{field: value})
    with pytest.raises(WeightsError, match=field):
        open_weights(folder).config()


@pytest.mark.parametrize("windows", [[4], [4, 4, 4], [-4, 4], [4, "a"], [4.5, 4], [[4, 4, 4], 4]], ids=str)
def test_pretrained_windows_that_cannot_be_are_refused_before_anything_is_loaded(
    windows: list[Any], folder: Path
) -> None:
    change(folder / "config.json", pretrained_window_sizes=windows)
    model = classifier()
    assert "pretrained_window_sizes" in refused(folder, model)
    assert model.config.pretrained_window_sizes is None


@pytest.mark.parametrize("model_type", ["swin", "vit", None])
def test_a_configuration_of_another_model_is_refused(model_type: str | None, folder: Path) -> None:
    change(folder / "config.json", model_type=model_type)
    assert f"model_type is {model_type!r} in config.json" in refused(folder)


def test_a_configuration_that_contradicts_the_shapes_is_refused(folder: Path) -> None:
    """A config.json of another model beside the weights: its windows would be another model's, too."""
    change(folder / "config.json", embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])
    assert "config.json" in refused(folder)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "..", "", ".", None, 3])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(shard: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"classifier.weight": shard}}))
    refused(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_named(index: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert str(folder) in refused(folder)


def test_an_index_that_promises_more_than_there_is_is_refused(folder: Path) -> None:
    places = {"classifier.weight": "model.safetensors", "swinv2.more": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    text = refused(folder)
    assert "swinv2.more" in text


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "model-00002-of-00002.safetensors" in refused(folder)


# --- writing ----------------------------------------------------------------------------------------------------------


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


@pytest.mark.parametrize(("style", "name"), [("native", "x.safetensors"), ("microsoft", "x.pth"), ("hf", "x")])
def test_nothing_is_overwritten(style: Any, name: str, tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / name, style)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="is there already") as refusal:
        save_weights(classifier(num_classes=9), tmp_path / name, style)
    assert refusal.value.exit_code == ExitCode.CANNOT_WRITE
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("style", "name"), [("native", "x.safetensors"), ("timm", "x.pth"), ("hf", "x")])
def test_a_destination_below_a_file_is_a_typed_error(style: Any, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="can't be written"):
        save_weights(classifier(), tmp_path / "file" / name, style)
    assert left_in(tmp_path) == {"file"}


@pytest.mark.parametrize("path", [".", "/", ""])
def test_a_destination_without_a_name_is_a_typed_error(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScaleError):
        save_weights(classifier(), path, "hf")


def test_a_destination_that_forbids_writing_is_a_typed_error() -> None:
    with pytest.raises(OutputError, match="can't be written"):
        save_weights(classifier(), "/proc/x.safetensors")


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow further, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 10_000, 150_000])
@pytest.mark.parametrize(("style", "name"), [("native", "x.safetensors"), ("microsoft", "x.pth"), ("hf", "x")])
def test_a_disk_that_fills_up_leaves_nothing_behind(style: Any, name: str, room: int, tmp_path: Path) -> None:
    """150 kB: the tensors fit beside a .pth file, the file itself doesn't."""
    model = classifier(**{**FOUR_STAGES, "image_size": 192, "window_size": 12})
    assert sum(value.nbytes for value in state(model).values()) > 150_000
    with files_up_to(room), pytest.raises(OutputError, match="can't be written"):
        save_weights(model, tmp_path / name, style)
    assert left_in(tmp_path) == set()


def test_a_source_that_breaks_off_leaves_nothing_behind_and_says_so_itself(tmp_path: Path) -> None:
    save_weights(simmim(), tmp_path / "x.safetensors")
    source = open_weights(tmp_path / "x.safetensors")

    def broken(name: str) -> Tensor:
        raise WeightsError(f"{name} can't be read")

    breaking = type(source)(source.where, source.style, source.facts, source.metas, broken, {})
    for style, name in (("native", "y.safetensors"), ("microsoft", "y.pth"), ("hf", "y")):
        with pytest.raises(WeightsError, match="can't be read"):
            write_weights(breaking, tmp_path / "out" / name, style)  # type: ignore[arg-type]
    assert left_in(tmp_path) == {"x.safetensors", "out"}


def test_what_a_killed_writer_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".part-x.safetensors").write_bytes(b"half")
    (tmp_path / ".part-y").mkdir()
    (tmp_path / ".part-y" / "config.json").write_text("half")
    save_weights(classifier(), tmp_path / "x.safetensors")
    save_weights(classifier(), tmp_path / "y", "hf")
    assert left_in(tmp_path) == {
        *(".part-x.safetensors", ".part-y", "config.json", "x.safetensors", "y"),
        *("model.safetensors", "preprocessor_config.json"),
    }  # may be another writer's
    assert len(load_weights(classifier(), tmp_path / "y").loaded) == len(state(classifier()))


@pytest.mark.parametrize("name", ["x", "x.bin", "x.ckpt", "x.safetensors.gz"])
def test_a_suffix_that_says_no_format_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"\.safetensors or \.pth"):
        save_weights(classifier(), tmp_path / name)
    assert left_in(tmp_path) == set()


def test_a_folder_is_not_given_the_suffix_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="folder"):
        save_weights(classifier(), tmp_path / "x.safetensors", "hf")


def test_an_unknown_format_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as refusal:
        save_weights(classifier(), tmp_path / "x.pth", "huggingface")  # type: ignore[arg-type]
    assert all(style in str(refusal.value) for style in ("hf", "timm", "microsoft", "torchvision", "native"))


def test_labels_of_another_number_of_classes_are_refused_rather_than_replaced(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"3 class names are given for 5 classes"):
        save_weights(classifier(), tmp_path / "x", "hf", facts=Facts(labels=("a", "b", "c")))
