"""Labels are counted when shards are written or indexed, and checked before a training starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swinv2_scale.config.run import RemoteConfig
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.folder_index import index_folders
from swinv2_scale.data.shards.labels import LabelCount, Labels, check_labels, read_class_names, read_labels
from swinv2_scale.data.shards.manifest import read_manifest, write_manifest
from swinv2_scale.data.shards.shard_set import read_shard_set
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.errors import ConfigError, DataError

Files = dict[str, bytes]


def written(folder: Path, samples: list[Files], **schema: list[str]) -> Path:
    raw = [{"__key__": f"k{number}", "bin": b"x", **files} for number, files in enumerate(samples)]
    write_shards(raw, folder, samples_per_shard=2, made_by="a test", schema=schema)
    return folder


def labels_of(*folders: Path) -> Labels:
    shards = read_shard_set([f"{folder}/*.tar" for folder in folders])
    return read_labels(shards, RemoteFiles(RemoteConfig()))


SAMPLES: list[Files] = [{"cls": b"3"}, {"json": b'{"label": 0}'}, {"cls": b"7", "json": b"{}"}]


def test_labels_are_counted_when_shards_are_written(tmp_path: Path) -> None:
    found = labels_of(written(tmp_path / "s", SAMPLES))
    assert found == Labels((), LabelCount(samples=3, smallest=0, largest=7))


def test_an_index_counts_the_labels_of_foreign_tars(tmp_path: Path) -> None:
    folder = written(tmp_path / "s", [*SAMPLES, {"cls": b"1 4"}, {"json": b'{"label": [1, 2]}'}, {"cls": b""}])
    for path in (*folder.glob("*.index"), folder / "manifest.json"):
        path.unlink()
    index_folders([str(path) for path in sorted(folder.glob("*.tar"))], RemoteFiles(RemoteConfig()))
    assert labels_of(folder).counted == LabelCount(samples=3, smallest=0, largest=7, others=3)


def test_a_long_json_is_no_label(tmp_path: Path) -> None:
    long = json.dumps({"label": 1, "text": "x" * 2**17}).encode()
    assert labels_of(written(tmp_path / "s", [{"json": long}, {"cls": b"2"}])).counted == LabelCount(1, 2, 2)


def test_folders_are_counted_together_and_must_name_the_same_classes(tmp_path: Path) -> None:
    cats = written(tmp_path / "cats", [{"cls": b"0"}], classes=["n1", "n2"], class_names=["cat", "dog"])
    dogs = written(tmp_path / "dogs", [{"cls": b"1"}])
    assert labels_of(cats, dogs) == Labels(("cat", "dog"), LabelCount(2, 0, 1))
    fish = written(tmp_path / "fish", [{"cls": b"1"}], classes=["fish", "bird"])
    with pytest.raises(DataError, match="name different classes"):
        labels_of(cats, fish)


def test_a_manifest_of_an_earlier_version_leaves_the_check_to_the_samples(tmp_path: Path) -> None:
    folder = written(tmp_path / "s", SAMPLES)
    manifest = read_manifest(str(folder))
    schema = {key: value for key, value in manifest.schema.items() if key != "labels"}
    write_manifest(folder, manifest.entries.values(), manifest.made_by, schema)
    found = labels_of(folder)
    assert found.counted is None
    check_labels(found, 3, 2, "data.train")  # says nothing: nobody knows


def test_a_count_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "s", SAMPLES)
    manifest = read_manifest(str(folder))
    for count in ({"samples": "3"}, {"smallest": 0.5}, {"strange": 1}, [1]):
        write_manifest(folder, manifest.entries.values(), manifest.made_by, {**manifest.schema, "labels": count})
        with pytest.raises(DataError, match="doesn't count labels as we do"):
            labels_of(folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            Labels(("a", "b", "c"), LabelCount(4, 0, 2)),
            r"has 3 classes \(a, b, c, ..\), model.num_class.* 2\n.*to 3",
        ),
        (Labels((), LabelCount(4, 0, 2)), r"has labels 0 to 2, model.num_classes is 2.*\n.*num_classes to 3"),
        (Labels((), LabelCount(3, 0, 1)), r"1 of 4 samples of data.train have no label"),
        (Labels((), LabelCount()), r"4 of 4 samples of data.train have no label"),
        (
            Labels((), LabelCount(3, 0, 1, others=1)),
            r"1 samples whose label isn't one whole.*\n.*one label an image",
        ),
    ],
)
def test_what_a_classifier_cannot_learn_from_is_refused(labels: Labels, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(labels, 4, 2, "data.train")


def test_labels_that_fit_are_accepted() -> None:
    check_labels(Labels(("a", "b"), LabelCount(4, 0, 1)), 4, 2, "data.train")
    check_labels(Labels((), LabelCount(4, 0, 0)), 4, 2, "data.train")  # a class may have no sample


def test_a_share_that_may_be_damaged_is_for_labels_too() -> None:
    few = LabelCount(samples=98, largest=7, others=1)
    check_labels(Labels((), few), 100, 2, "data.train", share=0.02)
    with pytest.raises(DataError, match=r"2 of 100 samples of data.train have no label"):
        check_labels(Labels((), LabelCount(98, 0, 1)), 100, 2, "data.train", share=0.01)


def test_class_names_are_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cat\n\n  dog \n", encoding="utf-8")
    assert read_class_names(path, 2) == ("cat", "dog")
    with pytest.raises(ConfigError, match="has 2 names, the model has 3 classes"):
        read_class_names(path, 3)
    with pytest.raises(ConfigError, match="cannot read the class names"):
        read_class_names(tmp_path / "missing.txt", 2)


def test_data_sets_that_call_their_classes_alike_compare_though_one_has_no_words(tmp_path: Path) -> None:
    first = labels_of(written(tmp_path / "1k", [{"cls": b"0"}], classes=["n1", "n2"], class_names=["cat", "dog"]))
    second = labels_of(written(tmp_path / "v2", [{"cls": b"0"}], classes=["n1", "n2"]))
    assert first.classes == second.classes == ("n1", "n2")
    assert (first.names, second.names) == (("cat", "dog"), ("n1", "n2"))
