"""ImageNet-1K, -22K and -V2: folders by WordNet id, the flat validation images with the devkit, and Kaggle's copy."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from pathlib import Path

from swinv2_scale.data.images.decode import IMAGE_FORMATS
from swinv2_scale.data.sources.folders import list_class_folders
from swinv2_scale.data.sources.listing import (
    Item,
    Keys,
    Source,
    files_below,
    first_existing,
    note_others,
    read_rows,
    read_text,
    subfolders,
)
from swinv2_scale.errors import DataError

_DEVKIT = "ILSVRC2012_devkit_t12/data"
_KAGGLE_SPLITS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_SPLIT_FOLDERS = {"train": "train", "validation": "val"}


def list_imagenet(root: Path, split: str) -> Source:
    """Labels are positions in the sorted WordNet ids, as everybody's ImageNet weights have them.

    Read are ``train/nXXXXXXXX/*.JPEG``; ``val/`` in such folders, or flat with the devkit's ground truth or Kaggle's
    ``LOC_val_solution.csv``; Kaggle's ``ILSVRC/Data/CLS-LOC/{train,val}``; a folder of class folders itself
    (ImageNet-22K).

    Raises:
        DataError: none of those, or images without a label.
    """
    splits = first_existing(root / name for name in _KAGGLE_SPLITS) or root
    folder = splits / _SPLIT_FOLDERS[split]
    if not folder.is_dir():
        if any((splits / name).is_dir() for name in _SPLIT_FOLDERS.values()):
            raise DataError(f"{folder} is missing", "unpack it there, or write the other --split")
        folder = splits
    names = subfolders(folder)
    if names and all(name.isdecimal() for name in names):
        raise DataError(f"{folder} holds folders that are called by numbers", "for ImageNet-V2: --from imagenet-v2")
    if not names:
        return _flat(root, folder)
    # A validation set with fewer classes still has the training set's labels.
    wnids = subfolders(splits / "train") if split == "validation" and (splits / "train").is_dir() else names
    unknown = sorted(set(names) - set(wnids))
    if unknown:
        raise DataError(f"{folder} has {len(unknown)} classes that {splits / 'train'} has not: {unknown[0]}, ..")
    labels = {name: label for label, name in enumerate(wnids)}
    source = list_class_folders(folder, {name: labels[name] for name in names}, wnids)
    return _with_words(source, _kaggle_words(root))


def list_imagenet_v2(root: Path) -> Source:
    """ImageNet-V2: folders ``0`` to ``999``, each named by the label itself: sorted as text, ``10`` would come before
    ``2``. Its classes are those of ImageNet-1K, so that their labels compare.

    Args:
        root: the folder of those, like ``imagenetv2-matched-frequency-format-val``, or the one that it alone lies in.

    Raises:
        DataError: no such folders, or others among them.
    Source: code/make_imagenet_folders.py of modestyachts/ImageNetV2: a folder's number is the class's position among
        the sorted WordNet ids.
    """
    wnids = imagenet_1k_wnids()
    candidates = [root, *(root / name for name in subfolders(root))]
    found = [place for place in candidates if any(name.isdecimal() for name in subfolders(place))]
    if len(found) != 1:
        what = f"several: {', '.join(place.name for place in found)}" if found else "none"
        raise DataError(f"{root} should hold one folder with ImageNet-V2's folders 0 to 999, there is {what}")
    labels = {str(label): label for label in range(len(wnids))}
    strange = sorted(set(subfolders(found[0])) - set(labels))
    if strange:
        raise DataError(f"{found[0]} holds {strange[0]!r}, ImageNet-V2's folders are 0 to {len(wnids) - 1}")
    there = {name: labels[name] for name in subfolders(found[0])}
    return list_class_folders(found[0], there, wnids)


def imagenet_1k_wnids() -> list[str]:
    """ImageNet-1K's classes in the order of labels."""
    return (resources.files("swinv2_scale.data") / "embedded" / "imagenet_1k_wnids.txt").read_text("ascii").split()


def _flat(root: Path, folder: Path) -> Source:
    solution = first_existing(place / "LOC_val_solution.csv" for place in (root, root.parent))
    devkit = first_existing(place / _DEVKIT for place in (root, root.parent))
    if solution is not None:
        words = _kaggle_words(root)
        wnid_of = _kaggle_solution(solution)
    elif devkit is not None:
        wnid_of, words = _devkit(devkit)
    else:
        raise DataError(
            f"the images in {folder} have no labels: there is neither {_DEVKIT}/ nor LOC_val_solution.csv in {root}",
            "unpack ILSVRC2012_devkit_t12.tar.gz there; for images without labels use --from imagefolder",
        )
    wnids = sorted(words or set(wnid_of.values()))
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    others: Counter[str] = Counter()
    keys = Keys()
    items = []
    for path in files_below(folder, IMAGE_FORMATS.__contains__, others):
        name = Path(path).stem
        if name not in wnid_of:
            raise DataError(f"{folder / path} is not among the {len(wnid_of)} images of {solution or devkit}")
        items.append(Item(keys.of(path), (path,), labels[wnid_of[name]]))
    notes = note_others(others)
    if not items:
        raise DataError(f"no images below {folder}")
    if len(items) < len(wnid_of):
        notes.append(f"{len(wnid_of) - len(items)} of {len(wnid_of)} images are not there")
    return _with_words(Source(folder, items, {"classes": wnids}, notes), words)


def _with_words(source: Source, words: dict[str, str]) -> Source:
    if words:
        source.schema["class_names"] = [words.get(wnid, wnid) for wnid in source.schema["classes"]]
    return source


def _kaggle_words(root: Path) -> dict[str, str]:
    """WordNet id -> words, of ``LOC_synset_mapping.txt``; none if it isn't there."""
    path = first_existing(place / "LOC_synset_mapping.txt" for place in (root, root.parent))
    if path is None:
        return {}
    pairs = (line.partition(" ") for line in read_text(path).splitlines() if line.strip())
    return {wnid: words for wnid, _, words in pairs}


def _kaggle_solution(path: Path) -> dict[str, str]:
    """Image -> WordNet id: a row's prediction starts with the id, boxes follow."""
    rows = read_rows(path, "ImageId", "PredictionString")
    return {row["ImageId"]: row["PredictionString"].partition(" ")[0] for row in rows}


def _devkit(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(image -> WordNet id, WordNet id -> words) of ILSVRC2012's devkit, whose own ids follow no order."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise DataError(f"{folder / 'meta.mat'} needs scipy", "pip install 'swinv2-scale[imagenet]'") from error
    try:
        synsets = loadmat(str(folder / "meta.mat"), squeeze_me=True)["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
    except Exception as error:  # scipy raises a dozen types on files that aren't what they should be
        raise DataError(f"{folder / 'meta.mat'} is not the devkit's: {error!r}", "unpack the devkit again") from error
    truth = folder / "ILSVRC2012_validation_ground_truth.txt"
    try:
        ids = [int(line) for line in read_text(truth).split()]
        return {f"ILSVRC2012_val_{number:08d}": wnids[id] for number, id in enumerate(ids, start=1)}, words
    except (ValueError, KeyError) as error:
        raise DataError(f"{truth} is not the devkit's: {error!r}", "unpack the devkit again") from error
