"""Small trees as the data sets' owners lay them out: which samples, labels and keys are found in them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from swinv2_scale.data.shards.manifest import sample_key
from swinv2_scale.data.sources.choice import list_source, split_of
from swinv2_scale.data.sources.imagenet import imagenet_1k_wnids
from swinv2_scale.data.sources.listing import Item, Keys, Source
from swinv2_scale.errors import ConfigError, DataError


def put(root: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def labels_of(source: Source) -> dict[str, int | None]:
    return {item.files[0]: item.label for item in source.items}


def known(item: Item) -> object:
    return json.loads(item.json or b"null")


# --- imagefolder ------------------------------------------------------------------------------------------------------


def test_an_image_folder_has_the_samples_and_labels_that_torchvision_finds(tmp_path: Path) -> None:
    names = [
        "zebra/a.jpg",
        "ant/deep/er/b.PNG",
        "ant/a.jpeg",
        "10/c.webp",
        "2/d.bmp",
        "Ünï cøde/e f.tiff",
        "ant/.x/g.jpg",
    ]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "jpeg"}.get(name.rpartition(".")[2].lower())
        Image.new("L", (4, 4), number).save(tmp_path / name, kind)
    put(tmp_path, "ant/notes.txt", "zebra/Thumbs.db")
    source = list_source("imagefolder", tmp_path, None)
    peer = torchvision.datasets.ImageFolder(tmp_path)
    # Files in hidden folders are the one difference.
    theirs = {os.path.relpath(path, tmp_path): label for path, label in peer.samples if "/." not in path}
    assert labels_of(source) == theirs
    assert source.schema == {"classes": peer.classes}
    assert any("2 files were left out" in note and ".txt" in note for note in source.notes)
    assert not any("'10' before '2'" in note for note in source.notes)  # some names are words


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    put(tmp_path, "b.jpg", "a.jpg")
    source = list_source("imagefolder", tmp_path, None)
    assert source.items == [Item("a", ("a.jpg",)), Item("b", ("b.jpg",))]
    assert source.schema == {}


def test_what_a_person_would_stumble_over_is_said(tmp_path: Path) -> None:
    put(tmp_path, "10/a.jpg", "9/a.jpg", "loose.jpg")
    (tmp_path / "11").mkdir()
    notes = "\n".join(list_source("imagefolder", tmp_path, None).notes)
    assert "1 classes have no image: 11" in notes
    assert "1 images lie in no class's folder" in notes
    assert "'10' before '2'" in notes


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "x.jpg")
    put(tmp_path / "s", "a/y.jpg")
    (tmp_path / "s" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "s" / "a" / "up").symlink_to(tmp_path / "s" / "a")
    (tmp_path / "s" / "b").symlink_to(tmp_path / "elsewhere")
    found = labels_of(list_source("imagefolder", tmp_path / "s", None))
    assert found == {"a/linked/x.jpg": 0, "a/y.jpg": 0, "b/x.jpg": 1}


def test_nothing_there_is_a_data_error_that_names_the_folder(tmp_path: Path) -> None:
    put(tmp_path, "readme.txt")
    for layout in ("imagefolder", "imagenet", "coco", "ade20k", "kinetics"):
        with pytest.raises(DataError, match=tmp_path.name):
            list_source(layout, tmp_path, split_of(layout, None))
        with pytest.raises(DataError, match="does not exist"):
            list_source(layout, tmp_path / "nowhere", split_of(layout, None))


def test_a_split_is_train_unless_said_and_an_error_where_there_are_none() -> None:
    assert [split_of(layout, None) for layout in ("imagenet", "coco", "imagefolder")] == ["train", "train", None]
    assert split_of("kinetics", "validation") == "validation"
    for layout in ("imagefolder", "csv"):
        with pytest.raises(ConfigError, match="no splits"):
            split_of(layout, "train")


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764/n01440764_10026"),
        ("v1.0/a.b.c.jpg", "v1_0/a_b_c"),
        ("a b/ö 長.jpg", "a b/ö 長"),
        ("caf\udce9/x.jpg", "caf%E9/x"),
        ("new\nline\x7f.jpg", "new_line_"),
        ("../up/x.jpg", "__/up/x"),
        ("/absolute/x.jpg", "absolute/x"),
        ("__background__/x.jpg", "_background__/x"),
        (".jpg", "_jpg"),
    ],
)
def test_a_key_is_the_path_as_far_as_webdataset_takes_it(path: str, key: str) -> None:
    assert Keys().of(path) == key


def test_paths_that_would_get_one_key_are_numbered() -> None:
    keys = Keys()
    paths = ["a.jpg", "a.png", "a-2.jpg", "a.b.jpg", "a_b.jpg", "a.gif"]
    assert [keys.of(path) for path in paths] == ["a", "a-2", "a-2-2", "a_b", "a_b-2", "a-3"]


@given(st.lists(st.text("ab._-/é\udce9\n", min_size=1, max_size=6), max_size=30))
def test_keys_are_unique_utf8_and_survive_webdatasets_cut(paths: list[str]) -> None:
    keys = Keys()
    found = [keys.of(path) for path in paths]
    assert len(set(found)) == len(found)
    for key in found:
        key.encode()
        assert sample_key(f"{key}.seg.png") == key
        assert not key.startswith("/")
        assert key


# --- imagenet ---------------------------------------------------------------------------------------------------------

WNIDS = ["n01440764", "n01443537", "n15075141"]
#: ILSVRC2012's own ids follow no order.
IDS = {"n01440764": 3, "n01443537": 1, "n15075141": 2}


def imagenet(root: Path) -> Path:
    put(root, *(f"train/{wnid}/{wnid}_{number}.JPEG" for wnid in reversed(WNIDS) for number in (2, 1)))
    return root


def devkit(root: Path, ids: list[int]) -> None:
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    # As published: leaves first in the order of ids, then inner nodes, and more fields behind.
    rows = sorted((number, wnid, f"words of {wnid}", "gloss", 0, [], 0, 732) for wnid, number in IDS.items())
    rows.append((4, "n00001740", "entity", "gloss", 3, [1, 2, 3], 1, 0))
    names = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    table = np.empty((len(rows), 1), dtype=[(name, object) for name in names])
    for row, values in enumerate(rows):
        for name, value in zip(names, values, strict=True):
            table[row, 0][name] = np.array(value) if isinstance(value, list) else value
    savemat(folder / "meta.mat", {"synsets": table})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in ids))


def test_imagenets_training_images_are_labelled_by_sorted_wordnet_ids(tmp_path: Path) -> None:
    source = list_source("imagenet", imagenet(tmp_path), "train")
    assert source.schema["classes"] == WNIDS
    assert labels_of(source) == {f"{w}/{w}_{n}.JPEG": i for i, w in enumerate(WNIDS) for n in (1, 2)}


@pytest.mark.parametrize("place", ["beside val", "above"])
def test_flat_validation_images_get_their_labels_from_the_devkit(tmp_path: Path, place: str) -> None:
    root = tmp_path / "ILSVRC2012"
    put(root, *(f"val/ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3, 4)))
    devkit(root if place == "beside val" else tmp_path, [2, 1, 3, 3])
    source = list_source("imagenet", root, "validation")
    wnids = {number: wnid for wnid, number in IDS.items()}
    wanted = [WNIDS.index(wnids[number]) for number in (2, 1, 3, 3)]
    assert [item.label for item in source.items] == wanted
    assert source.schema == {"classes": WNIDS, "class_names": [f"words of {wnid}" for wnid in WNIDS]}


def test_validation_images_in_folders_have_the_training_images_labels(tmp_path: Path) -> None:
    put(imagenet(tmp_path), f"val/{WNIDS[2]}/a.JPEG", f"val/{WNIDS[0]}/b.JPEG")
    source = list_source("imagenet", tmp_path, "validation")
    assert labels_of(source) == {f"{WNIDS[0]}/b.JPEG": 0, f"{WNIDS[2]}/a.JPEG": 2}
    put(tmp_path, "val/n99999999/c.JPEG")
    with pytest.raises(DataError, match="n99999999"):
        list_source("imagenet", tmp_path, "validation")


def test_kaggles_copy_is_read_with_its_two_tables(tmp_path: Path) -> None:
    imagenet(tmp_path / "ILSVRC" / "Data" / "CLS-LOC")
    put(tmp_path / "ILSVRC" / "Data" / "CLS-LOC", *(f"val/ILSVRC2012_val_{n:08d}.JPEG" for n in (1, 2)))
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} words, of {wnid}\n" for wnid in WNIDS))
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        f"ILSVRC2012_val_00000002,{WNIDS[1]} 85 1 499 272 \n"
        f"ILSVRC2012_val_00000001,{WNIDS[2]} 1 2 3 4 {WNIDS[2]} 5 6 7 8 \n"
    )
    train, validation = (list_source("imagenet", tmp_path, split) for split in ("train", "validation"))
    assert [item.label for item in train.items] == [0, 0, 1, 1, 2, 2]
    assert [item.label for item in validation.items] == [2, 1]
    assert train.schema == validation.schema
    assert train.schema["class_names"][0] == f"words, of {WNIDS[0]}"


V2 = "imagenetv2-matched-frequency-format-val"


@pytest.mark.parametrize("given", ["the folder", "the one above"])
def test_imagenet_v2s_folders_are_the_labels_themselves_not_sorted_as_text(tmp_path: Path, given: str) -> None:
    # Sorted as text 10 and 100 come before 2: a list of folders would make them 1, 2 and 3.
    put(tmp_path, *(f"{V2}/{label}/image.jpeg" for label in (0, 2, 10, 100, 999)))
    source = list_source("imagenet-v2", tmp_path / V2 if given == "the folder" else tmp_path, None)
    assert labels_of(source) == {f"{label}/image.jpeg": label for label in (0, 2, 10, 100, 999)}


def test_imagenet_v2_and_imagenet_1k_have_the_same_classes_by_name(tmp_path: Path) -> None:
    wnids = imagenet_1k_wnids()
    put(tmp_path, *(f"1k/train/{wnid}/{wnid}_1.JPEG" for wnid in wnids), f"1k/val/{wnids[10]}/a.JPEG", "v2/10/b.jpeg")
    first = list_source("imagenet", tmp_path / "1k", "validation")
    second = list_source("imagenet-v2", tmp_path / "v2", None)
    assert first.schema["classes"] == second.schema["classes"] == wnids
    assert [item.label for item in first.items + second.items] == [10, 10]


def test_the_list_of_imagenets_classes_is_everybodys() -> None:
    wnids = imagenet_1k_wnids()
    assert len({*wnids}) == 1000
    assert wnids == sorted(wnids)  # as torchvision's ImageFolder numbers them
    # tench, goldfish, Bernese mountain dog, tabby, teddy, toilet tissue: labels that are cited everywhere
    known = {0: "n01440764", 1: "n01443537", 239: "n02107683", 281: "n02123045", 850: "n04399382", 999: "n15075141"}
    assert {label: wnids[label] for label in known} == known


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["n01440764"], "none"),
        (["0", "1000"], "'1000'"),
        (["0", "01"], "'01'"),
        ([f"{V2}/0", "imagenetv2-top-images-format-val/0"], "several"),
    ],
)
def test_what_is_not_imagenet_v2_is_refused(tmp_path: Path, folders: list[str], said: str) -> None:
    put(tmp_path, *(f"{folder}/image.jpeg" for folder in folders))
    with pytest.raises(DataError, match=said):
        list_source("imagenet-v2", tmp_path, None)


def test_folders_called_by_numbers_are_not_taken_for_wordnet_ids(tmp_path: Path) -> None:
    put(tmp_path, "val/0/a.JPEG", "val/10/a.JPEG")
    with pytest.raises(DataError, match="numbers") as caught:
        list_source("imagenet", tmp_path, "validation")
    assert "imagenet-v2" in caught.value.report


def test_imagenet_22k_is_a_folder_of_wordnet_ids(tmp_path: Path) -> None:
    put(tmp_path, "n00005787/n00005787_13.JPEG", "n00004475/n00004475_6590.JPEG")
    source = list_source("imagenet", tmp_path, "train")
    assert [item.label for item in source.items] == [0, 1]


@pytest.mark.parametrize("spoil", ["no devkit", "no meta", "too few", "not published"])
def test_validation_images_without_a_label_are_an_error(tmp_path: Path, spoil: str) -> None:
    put(tmp_path, *(f"val/ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2)))
    if spoil != "no devkit":
        devkit(tmp_path, {"too few": [1], "not published": [1, 77]}.get(spoil, [1, 2]))
    if spoil == "no meta":
        (tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(b"no matrix")
    with pytest.raises(DataError, match=r"devkit|ILSVRC2012_val_00000002"):
        list_source("imagenet", tmp_path, "validation")


# --- coco, ade20k, kinetics -------------------------------------------------------------------------------------------


def coco(root: Path, split: str = "train2017") -> dict[str, object]:
    images = [
        {"license": 3, "file_name": f"{number:012d}.jpg", "height": 480, "width": 640, "id": number}
        for number in (522418, 9, 318219)
    ]
    annotation = {"segmentation": [[1.5, 2, 3, 4.25]], "area": 54.9, "iscrowd": 0, "bbox": [1.0, 2.5, 3.0, 4.0]}
    annotations = [
        {**annotation, "image_id": 9, "category_id": 90, "id": 1},
        {**annotation, "image_id": 522418, "category_id": 1, "id": 2},
        {**annotation, "image_id": 9, "category_id": 1, "id": 3},
    ]
    categories = [{"supercategory": "person", "id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
    data: dict[str, object] = {"images": images, "annotations": annotations, "categories": categories}
    put(root, *(f"{split}/{image['file_name']}" for image in images))
    put(root, f"annotations/instances_{split}.json", content=json.dumps(data).encode())
    return data


@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_coco_image_has_its_annotations_as_published_or_none(tmp_path: Path, split: str) -> None:
    data = coco(tmp_path / "coco", {"train": "train2017", "validation": "val2017"}[split])
    source = list_source("coco", tmp_path, split)
    assert source == list_source("coco", tmp_path / "coco", split)
    assert source.schema == {"categories": data["categories"]}
    found = {item.files[0].rpartition("/")[2]: known(item) for item in source.items}
    assert list(found) == ["000000000009.jpg", "000000318219.jpg", "000000522418.jpg"]
    annotations = data["annotations"]
    assert isinstance(annotations, list)
    for name, value in found.items():
        number = int(name.removesuffix(".jpg"))
        of_image = [annotation for annotation in annotations if annotation["image_id"] == number]
        assert value == {"image_id": number, "file_name": name, "width": 640, "height": 480, "annotations": of_image}


@pytest.mark.parametrize(
    "spoil", [lambda d: d.pop("images"), lambda d: d["images"].pop(), lambda d: d["annotations"].append(3)]
)
def test_a_json_that_is_not_cocos_is_named(tmp_path: Path, spoil: Callable[[dict[str, object]], object]) -> None:
    data = coco(tmp_path)
    data["images"] = sorted(data["images"], key=lambda image: -image["id"])  # type: ignore[call-overload]
    spoil(data)
    put(tmp_path, "annotations/instances_train2017.json", content=json.dumps(data).encode())
    with pytest.raises(DataError, match=r"instances_train2017\.json"):
        list_source("coco", tmp_path, "train")


def test_ade20k_images_come_with_masks_and_scenes(tmp_path: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    for folder, name in (("training", "ADE_train_00000001"), ("training", "ADE_train_00000002")):
        put(root, f"images/{folder}/{name}.jpg", f"annotations/{folder}/{name}.png")
    put(root, "images/validation/ADE_val_00000001.jpg", "annotations/validation/ADE_val_00000001.png")
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\nADE_val_00000001 attic\n")
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t1\t1\twall\n")
    source = list_source("ade20k", tmp_path, "train")
    assert source == list_source("ade20k", root, "train")
    first = "images/training/ADE_train_00000001.jpg", "annotations/training/ADE_train_00000001.png"
    assert source.items[0] == Item("training/ADE_train_00000001", first, None, b'{"scene":"airport_terminal"}')
    assert [known(item) for item in source.items] == [{"scene": "airport_terminal"}, None]
    assert source.schema == {"mask_classes": ["other", "wall"]}
    assert source.max_mask_value == 150
    assert len(list_source("ade20k", root, "validation").items) == 1
    (root / "annotations" / "training" / "ADE_train_00000002.png").unlink()
    with pytest.raises(DataError, match="ADE_train_00000002"):
        list_source("ade20k", root, "train")


HEADER = "label,youtube_id,time_start,time_end,split\n"


@pytest.mark.parametrize("place", ["annotations/", ""])
def test_kinetics_clips_are_found_flat_or_in_class_folders(tmp_path: Path, place: str) -> None:
    put(
        tmp_path,
        "train/-_abc_000003_000013.mp4",
        "train/zumba/xyz.1_000010_000020.webm",
        "train/stray_000000_000010.mp4",
    )
    train = (
        f'{HEADER}zumba,xyz.1,10,20,train\nabseiling,-_abc,3,13,train\n"a, b",gone,0,10,train\nzumba,-_abc,3,13,train\n'
    )
    put(tmp_path, f"{place}train.csv", content=train.encode())
    put(tmp_path, f"{place}val.csv", content=f"{HEADER}juggling,v,0,10,val\n".encode())
    source = list_source("kinetics", tmp_path, "train")
    assert source.schema == {"classes": ["a, b", "abseiling", "juggling", "zumba"]}
    assert labels_of(source) == {"-_abc_000003_000013.mp4": 1, "zumba/xyz.1_000010_000020.webm": 3}
    assert [item.key for item in source.items] == ["-_abc_000003_000013", "zumba/xyz_1_000010_000020"]
    assert known(source.items[0]) == {"youtube_id": "-_abc", "time_start": 3, "time_end": 13}
    notes = "\n".join(source.notes)
    assert "1 of 3 clips of train.csv are not there" in notes
    assert "1 clips are not in train.csv" in notes
    assert "1 rows of train.csv repeat a clip" in notes


# --- csv --------------------------------------------------------------------------------------------------------------


def table(tmp_path: Path, text: str) -> Source:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return list_source("csv", path, None)


def test_a_table_keeps_its_order_and_numbers_or_names_label_it(tmp_path: Path) -> None:
    numbers = table(tmp_path, "path,label\nb.jpg,7\nsub/a.png,0\n")
    assert (numbers.root, numbers.schema) == (tmp_path, {})
    assert numbers.items == [Item("b", ("b.jpg",), 7), Item("sub/a", ("sub/a.png",), 0)]
    names = table(tmp_path, '\ufeffid,label,path\n1,dog,b.jpg\n2,"cat, old",a.jpg\n')
    assert names.items == [Item("b", ("b.jpg",), 1), Item("a", ("a.jpg",), 0)]
    assert names.schema == {"classes": ["cat, old", "dog"]}
    assert table(tmp_path, "path\nb.jpg\n").items == [Item("b", ("b.jpg",))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\na.jpg,1\n", "no column path"),
        ("path,label\n", "no rows"),
        ("", "no column path"),
        ("path,label\na.jpg,1\nb.jpg,2\nc.jpg,l0\n", "row 4: the label 'l0' is a name"),
        ("path,label\na.jpg,1\nb.jpg,2\nc.jpg,\n", "row 4: the label '' is missing"),
        ("path,label\na.jpg,1\nb.jpg,2\nc.jpg,-1\n", "row 4: the label '-1'"),
        ("path,label\na.txt,1\n", "row 2: 'a.txt' is no image"),
    ],
)
def test_a_table_with_a_mistake_is_refused_with_the_row(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        table(tmp_path, text)


def test_a_listing_does_not_depend_on_the_order_of_the_disk(tmp_path: Path) -> None:
    names = [f"{c}/{n}.jpg" for c in "abc" for n in range(9)]
    for folder in ("one", "two"):
        random.Random(folder).shuffle(names)
        put(tmp_path / folder, *names)
    one, two = (list_source("imagefolder", tmp_path / folder, None) for folder in ("one", "two"))
    assert one.items == two.items
