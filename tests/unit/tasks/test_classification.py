"""Classification: what a sample holds, what is learned from it, what an evaluation counts."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.images.mixing import draw_mixing
from swinv2_scale.data.loader import Batch
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.draws import Draw
from swinv2_scale.engine.start import first_values
from swinv2_scale.tasks.classification import MAX_CONFUSION_CLASSES, Classification, ClassificationTask

torch.set_num_threads(1)

EVERYTHING: dict[str, object] = {
    "aa": "rand-m9-mstd0.5-inc1",
    "reprob": 1.0,
    "recount": 3,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
}


def config(num_classes: int = 7, **changes: dict[str, object]) -> RunConfig:
    """A small run; ``model={...}``, ``task={...}``, ``data={...}`` change its sections."""
    sections: dict[str, dict[str, object]] = {
        "model": {
            "image_size": 32,
            "embed_dim": 32,
            "depths": (1, 2),
            "num_heads": (2, 4),
            "window_size": 4,
            "num_classes": num_classes,
        },
        "data": {
            "train": "none",
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "pixel_mean": (0.3, 0.45, 0.6),
            "pixel_std": (0.2, 0.25, 0.3),
        },
        "task": {"name": "classification"},
        "optim": {"lr": 1e-3, "total_steps": 10},
    }
    for name, section in changes.items():
        sections[name] = {**sections[name], **section}
    return RunConfig.model_validate(sections)


def fresh(run: RunConfig) -> Classification:
    """The model as a run begins with it."""
    model = ClassificationTask(run).build_model()
    assert isinstance(model, Classification)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in first_values(model, {name: p.shape for name, p in parameters.items()}, run, None):
            parameters[name].copy_(value)
    return model


def lively(run: RunConfig) -> Classification:
    """Norm gains that let every block do something, and logits of some size."""
    model = fresh(run)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm1.weight", "norm2.weight")):
                parameter.fill_(0.7)
            if name.endswith("head.weight"):
                parameter.mul_(20)
    return model


def pixels_of(count: int = 4, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))


def mixing_of(count: int, mixup: float, cutmix: float) -> Tensor:
    return torch.from_numpy(np.stack([draw_mixing(0, p, (32, 32), mixup, cutmix, 0.5) for p in range(count)]))


def record(key: str = "a", label: int = 3, pixel_type: str = "uint8") -> Record:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    if pixel_type == "uint8":
        Image.fromarray(pixels).save(buffer, "PNG")
        return Record(key, f"000000.tar: {key}", {"png": buffer.getvalue(), "cls": str(label).encode()})
    np.save(buffer, pixels.astype(pixel_type))
    return Record(key, f"000000.tar: {key}", {"npy": buffer.getvalue(), "cls": str(label).encode()})


def as_bytes(sample: dict[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in sample.items()}


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_training_sample_is_a_function_of_its_record_and_its_draw() -> None:
    run = config(task=EVERYTHING, model={"drop_path_rate": 0.1})
    np.random.seed(0)
    task = ClassificationTask(run)
    wanted = as_bytes(task.training_sample(record(), Draw(0, 0, "a", 6)))
    assert set(wanted) == {"images", "labels", "mixing", "boxes", "noise_keys", "drop_keys"}
    others = [Draw(1, 0, "a", 6), Draw(0, 1, "a", 6), Draw(0, 0, "b", 6)]
    for draw in others:
        found = as_bytes(task.training_sample(record(), draw))
        for name in ("images", "boxes", "noise_keys", "drop_keys"):
            assert found[name] != wanted[name], (draw, name)
    np.random.seed(1)
    for again in (task, ClassificationTask(run)):
        assert as_bytes(again.training_sample(record(), Draw(0, 0, "a", 6))) == wanted


def test_neighbours_in_the_order_share_their_mixing_and_nothing_else_depends_on_the_position() -> None:
    task = ClassificationTask(config(task=EVERYTHING))
    even, odd, next_even = (as_bytes(task.training_sample(record(), Draw(0, 0, "a", p))) for p in (6, 7, 8))
    assert even == odd
    assert even.pop("mixing") != next_even.pop("mixing")
    assert even == next_even


def test_options_that_are_off_put_nothing_into_a_sample() -> None:
    task = ClassificationTask(config())
    assert set(task.training_sample(record(), Draw(0, 0, "a"))) == {"images", "labels"}
    assert set(ClassificationTask(config(task=EVERYTHING)).evaluation_sample(record(), Draw(0, 0, "a"))) == {
        "images",
        "labels",
    }


@pytest.mark.parametrize("pixel_type", ["uint8", "uint16", "float32"])
def test_the_memory_that_is_planned_covers_every_combination_of_options(pixel_type: str) -> None:
    options: list[tuple[dict[str, object], ...]] = [
        ({}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.0}),
        ({}, {"reprob": 0.5}, {"reprob": 1.0, "recount": 5}),
        ({}, {"aa": "rand-m9-inc1"}) if pixel_type == "uint8" else ({},),
    ]
    for chosen, rate in itertools.product(itertools.product(*options), (0.0, 0.1)):
        section = {name: value for part in chosen for name, value in part.items()}
        run = config(task=section, data={"pixel_type": pixel_type}, model={"drop_path_rate": rate})
        task = ClassificationTask(run)
        for make in (task.training_sample, task.evaluation_sample):
            sample = make(record(pixel_type=pixel_type), Draw(0, 0, "a"))
            assert sum(array.nbytes for array in sample.values()) <= task.sample_bytes, section
    fullest = ClassificationTask(config(task=EVERYTHING, model={"drop_path_rate": 0.1}))
    assert sum(a.nbytes for a in fullest.training_sample(record(), Draw(0, 0, "a")).values()) == fullest.sample_bytes


def test_the_label_is_the_records() -> None:
    task = ClassificationTask(config(task=EVERYTHING))
    for label in range(7):
        for make in (task.training_sample, task.evaluation_sample):
            found = make(record(label=label), Draw(0, 0, "a"))["labels"]
            assert (found.dtype, found.shape, int(found)) == (np.dtype(np.int64), (), label)


# --- loss -------------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, shares: list[dict[int, float]], smoothing: float) -> list[float]:
    """Of each row against its classes' shares, smoothed; in float64, one class at a time."""
    found = []
    for row, wanted in zip(logits.double().tolist(), shares, strict=True):
        total = math.log(sum(math.exp(value) for value in row))
        logs = [value - total for value in row]
        plain = sum(share * logs[label] for label, share in wanted.items())
        found.append(-(1 - smoothing) * plain - smoothing * sum(logs) / len(row))
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_loss_is_the_cross_entropy_with_a_share_of_the_label_spread_over_all_classes(smoothing: float) -> None:
    model = lively(config(task={"smoothing": smoothing}))
    images, labels = pixels_of(), torch.tensor([0, 6, 3, 3])
    with torch.no_grad():
        logits, losses = model(images), model(images, labels)
    assert logits.std() > 0.3
    wanted = cross_entropy(logits, [{int(label): 1.0} for label in labels], smoothing)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(wanted, rel=1e-5)  # float32


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_in_the_model_is_mixing_by_hand_before_it(mixup: float, cutmix: float) -> None:
    model = lively(config(task={"smoothing": 0.1, "mixup": mixup, "cutmix": cutmix}))
    images, labels, mixing = pixels_of(8), torch.tensor([0, 6, 3, 3, 1, 2, 5, 4]), mixing_of(8, mixup, cutmix)
    by_hand = images.double() / 255  # of float32 images the values are taken as they are
    sources, shares = by_hand.clone(), []
    for i, (inside, own, *box) in enumerate(mixing.double().tolist()):
        top, bottom, left, right = map(int, box)
        here, there = (sources[j, :, top:bottom, left:right] for j in (i, i ^ 1))
        by_hand[i, :, top:bottom, left:right] = inside * here + (1 - inside) * there
        both = (int(labels[i]), int(labels[i ^ 1]))
        shares.append({both[0]: own, both[1]: 1 - own} if both[0] != both[1] else {both[0]: 1.0})
    with torch.no_grad():
        losses = model(images, labels, mixing)
        logits = model(by_hand.float())
        plain = model(images, labels)
    assert losses.tolist() == pytest.approx(cross_entropy(logits, shares, 0.1), rel=1e-4)  # pixels rounded elsewhere
    assert not torch.allclose(losses, plain, rtol=1e-2)


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_what_lies_under_erased_boxes_does_not_matter(remode: str, is_mixed: bool) -> None:
    model = lively(config(task={"remode": remode, "reprob": 1.0, "recount": 2}))
    images, labels, keys = pixels_of(), torch.tensor([0, 6, 3, 3]), torch.arange(4)
    boxes = torch.tensor([[[4, 20, 3, 9], [10, 30, 5, 31]]] * 4, dtype=torch.int32)
    mixing = mixing_of(4, 0.8, 0.0) if is_mixed else None
    inside, outside = images.clone(), images.clone()
    for top, bottom, left, right in boxes[0].tolist():
        inside[:, :, top:bottom, left:right] ^= 255
    outside[:, :, :4] ^= 255
    with torch.no_grad():
        losses = model(images, labels, mixing, boxes, keys)
        assert torch.equal(model(inside, labels, mixing, boxes, keys), losses)
        assert not torch.equal(model(outside, labels, mixing, boxes, keys), losses)
        assert not torch.equal(model(images, labels, mixing), losses)
        other_noise = model(images, labels, mixing, boxes, keys + 1)
    assert torch.equal(other_noise, losses) == (remode == "const")


def test_the_loss_of_a_batch_is_the_mean_of_what_the_model_makes_of_all_its_arrays() -> None:
    run = config(task=EVERYTHING, model={"drop_path_rate": 0.9})
    task, model = ClassificationTask(run), lively(run)
    samples = [task.training_sample(record(key, label), Draw(0, 0, key, label)) for label, key in enumerate("abcd")]
    arrays = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
    names = {"images", "labels", "mixing", "boxes", "noise_keys", "drop_keys"}
    assert set(arrays) == names
    with torch.no_grad():
        found = task.loss(model, Batch(arrays, 0))
        assert torch.equal(found, model(**arrays).mean())
        for name in names - {"images", "labels", "boxes", "noise_keys"}:
            without = {key: array for key, array in arrays.items() if key != name}
            assert not torch.equal(task.loss(model, Batch(without, 0)), found), name


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_the_first_loss_is_the_logarithm_of_the_number_of_classes(num_classes: int) -> None:
    """Of a zero head exactly. With a deviation of 0.02 and 64 features of unit variance at most, logits deviate by 0.16
    at most: half of their variance is 0.013, and a mean over 16 images may be off by some hundredths."""
    images, labels = pixels_of(16), torch.arange(16) % num_classes
    for std, tolerance in ((0.02, 0.1), (0.0, 1e-6)):
        run = config(num_classes, task={"head_init_std": std})
        with torch.no_grad():
            loss = ClassificationTask(run).loss(fresh(run), Batch({"images": images, "labels": labels}, 0))
        assert loss.item() == pytest.approx(math.log(num_classes), abs=tolerance)


@pytest.mark.parametrize(("head_std", "num_steps"), [(0.02, 2), (0.0, 3)])
def test_after_two_steps_every_parameter_learns_and_with_a_zero_head_one_later(head_std: float, num_steps: int) -> None:
    """A step from zero each: the head's, then that of the gains after every branch."""
    run = config(task={**EVERYTHING, "head_init_std": head_std})
    task, model = ClassificationTask(run), fresh(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    samples = [task.training_sample(record(key, label), Draw(0, 0, key, label)) for label, key in enumerate("abcd")]
    batch = Batch({name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}, 0)
    still: list[list[str]] = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        still.append([name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()])
        optimizer.step()
    assert still[0]
    assert still[-1] == []


# --- evaluation -------------------------------------------------------------------------------------------------------


class Known(nn.Module):
    """Says logits that are known: of image n, whose pixels are all n, row n."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


def known_batch(count: int, num_classes: int, seed: int = 0) -> tuple[Known, Batch]:
    """``count`` samples, some of weight 0."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, count)
    logits = rng.normal(0, 2, (count, num_classes))
    logits[np.arange(count), labels] += rng.normal(2, 2, count)  # right more often than by chance
    arrays = {
        "images": torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 2, 2),
        "labels": torch.from_numpy(labels),
        "weight": torch.from_numpy((rng.random(count) < 0.8).astype(np.float32)),
    }
    return Known(torch.from_numpy(logits).float()), Batch(arrays, 0)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5, 6, 20, MAX_CONFUSION_CLASSES, MAX_CONFUSION_CLASSES + 1, 1500])
def test_an_evaluation_counts_what_a_loop_over_its_samples_counts(num_classes: int) -> None:
    count = 60
    task = ClassificationTask(config(num_classes))
    model, batch = known_batch(count, num_classes)
    sums = task.evaluation_sums(model, batch)
    assert sums.dtype == torch.float64
    labels, weights = batch.arrays["labels"].tolist(), batch.arrays["weight"].tolist()
    used = [i for i in range(count) if weights[i]]
    assert 0 < len(used) < count
    losses = cross_entropy(model.logits, [{label: 1.0} for label in labels], 0.0)
    matrix, top1, top5 = np.zeros((num_classes, num_classes)), 0, 0
    for i in used:
        order = sorted(range(num_classes), key=lambda k: -float(model.logits[i, k]))
        matrix[labels[i], order[0]] += 1
        top1 += order[0] == labels[i]
        top5 += labels[i] in order[:5]
    assert 0 < top1 < len(used)
    metrics = task.metrics(sums)
    assert metrics["loss"] == pytest.approx(sum(losses[i] for i in used) / len(used), rel=1e-6)  # float32 losses
    assert (metrics["top1"], metrics["top5"]) == (top1 / len(used), top5 / len(used))
    found = task.confusion(sums)
    if num_classes <= MAX_CONFUSION_CLASSES:
        assert found is not None
        assert np.array_equal(found.numpy(), matrix)
    else:
        assert found is None
        assert task.summary(sums, "") is None
    counts, rights = task.per_class(sums)
    assert counts.tolist() == matrix.sum(1).tolist()
    assert rights.tolist() == matrix.diagonal().tolist()
    assert (sums[0], sums[2], counts.sum(), rights.sum()) == (len(used), top1, len(used), top1)


def test_with_five_classes_or_fewer_the_label_is_always_among_the_five_best() -> None:
    for num_classes in (2, 5):
        task = ClassificationTask(config(num_classes))
        assert task.metrics(task.evaluation_sums(*known_batch(30, num_classes)))["top5"] == 1


@pytest.mark.parametrize("num_classes", [5, MAX_CONFUSION_CLASSES + 1])
def test_the_sums_are_the_same_bits_however_samples_are_dealt(num_classes: int) -> None:
    task = ClassificationTask(config(num_classes))
    model, batch = known_batch(60, num_classes)
    wanted = task.evaluation_sums(model, batch)
    order = torch.from_numpy(np.random.default_rng(0).permutation(60))
    for size in (1, 7, 32):
        parts = [
            Batch({name: array[chosen] for name, array in batch.arrays.items()}, 0) for chosen in order.split(size)
        ]
        sums = [task.evaluation_sums(model, part) for part in parts]
        for dealt in (sums, sums[::-1]):
            total = torch.zeros_like(wanted)
            for part in dealt:
                total = total + part
            assert torch.equal(total, wanted)


def test_no_samples_have_no_metrics_rather_than_good_ones() -> None:
    task = ClassificationTask(config(3))
    model, batch = known_batch(4, 3)
    batch.arrays["weight"].zero_()
    sums = task.evaluation_sums(model, batch)
    assert not sums.any()
    assert all(math.isnan(value) for value in task.metrics(sums).values())


def test_an_evaluation_neither_mixes_nor_smooths_nor_erases_nor_drops() -> None:
    plain, loud = config(), config(task=EVERYTHING, model={"drop_path_rate": 0.9})
    arrays = {"images": pixels_of(), "labels": torch.tensor([0, 6, 3, 3]), "weight": torch.ones(4)}
    extras = {"mixing": mixing_of(4, 0.8, 1.0), "drop_keys": torch.arange(4)}
    with torch.no_grad():
        wanted = ClassificationTask(plain).evaluation_sums(lively(plain), Batch(arrays, 0))
        found = ClassificationTask(loud).evaluation_sums(lively(loud), Batch({**arrays, **extras}, 0))
    assert torch.equal(found, wanted)


def test_classes_without_names_are_numbered() -> None:
    task = ClassificationTask(config(3))
    assert task._names == ("class 0", "class 1", "class 2")
    task.labels = ("cat", "dog", "owl")
    assert task._names == ("cat", "dog", "owl")
    task.labels = ("cat", "dog")  # of another data set
    assert task._names == ("class 0", "class 1", "class 2")
