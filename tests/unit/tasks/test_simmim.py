"""SimMIM: what is hidden, what is predicted, what is counted."""

from __future__ import annotations

import io
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.loader import Batch, PositionDataset, Share, training_batches
from swinv2_scale.data.order import Order
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.data.shards.shard_set import read_shard_set
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.data.sources.embedded import fashion_mnist
from swinv2_scale.draws import Draw
from swinv2_scale.models.factory import initialise
from swinv2_scale.tasks.simmim import SimMIM, SimMIMTask, draw_hidden

torch.set_num_threads(1)


def config(channels: int = 3, **changes: dict[str, object]) -> RunConfig:
    """A small run; ``model={...}``, ``task={...}`` change its sections."""
    sections: dict[str, dict[str, object]] = {
        "model": {
            "image_size": 32,
            "in_channels": channels,
            "embed_dim": 32,
            "depths": (1, 2),
            "num_heads": (2, 4),
            "window_size": 4,
        },
        "data": {
            "train": "none",
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "pixel_mean": (0.3, 0.45, 0.6)[:channels],
            "pixel_std": (0.2, 0.25, 0.3)[:channels],
        },
        "task": {"mask_patch_size": 8},
        "optim": {"lr": 1e-3, "total_steps": 10},
    }
    for name, section in changes.items():
        sections[name] = {**sections[name], **section}
    return RunConfig.model_validate(sections)


def fresh(run: RunConfig) -> SimMIM:
    model = SimMIMTask(run).build_model()
    assert isinstance(model, SimMIM)
    initialise(model, 0)
    return model


def lively(run: RunConfig) -> SimMIM:
    """Norm gains that let every block do something."""
    model = fresh(run)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm1.weight", "norm2.weight")):
                parameter.fill_(0.7)
    return model


def batch_of(run: RunConfig, count: int = 3) -> Batch:
    """Noise images under masks of the task's own drawing."""
    height, width = run.model.image_shape
    pixels = np.random.default_rng(0).integers(0, 256, (count, run.model.in_channels, height, width), dtype=np.uint8)
    unit = run.task.mask_patch_size
    masks = [
        draw_hidden((height // unit, width // unit), run.task.mask_ratio, Draw(0, 0, f"{i}")) for i in range(count)
    ]
    arrays = {
        "images": torch.from_numpy(pixels),
        "hidden": torch.from_numpy(np.stack(masks)),
        "drop_keys": torch.arange(count),
        "weight": torch.ones(count),
    }
    return Batch(arrays, 0)


def record(channels: int = 3, key: str = "a", size: tuple[int, int] = (50, 40)) -> Record:
    shape = (size[1], size[0], 3) if channels == 3 else (size[1], size[0])
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Record(key, f"000000.tar: {key}", {"png": buffer.getvalue()})


def hidden_at(hidden: Tensor, sample: int, y: int, x: int, unit: int) -> bool:
    return bool(hidden[sample, y // unit, x // unit])


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_size", "count"), [(192, (22, 36)), (224, (30, 49)), (256, (39, 64)), (320, (60, 100))])
def test_six_tenths_of_the_units_are_hidden_rounded_up(image_size: int, count: tuple[int, int]) -> None:
    side = image_size // 32
    hidden = draw_hidden((side, side), 0.6, Draw(0, 0, "a"))
    assert (hidden.sum(), hidden.size) == count


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.6, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("units", [(1, 1), (4, 4), (3, 7)])
def test_the_hidden_count_is_the_ratio_rounded_up(units: tuple[int, int], ratio: float) -> None:
    hidden = draw_hidden(units, ratio, Draw(0, 0, "a"))
    assert hidden.shape == units
    assert hidden.sum() == math.ceil(ratio * units[0] * units[1])


def test_a_mask_depends_on_seed_epoch_and_sample_and_on_nothing_else() -> None:
    def mask(seed: int, epoch: int | str, sample: str) -> bytes:
        return draw_hidden((8, 8), 0.6, Draw(seed, epoch, sample)).tobytes()

    np.random.seed(0)
    wanted = mask(0, 0, "a")
    np.random.seed(1)
    assert mask(0, 0, "a") == wanted
    assert len({wanted, mask(1, 0, "a"), mask(0, 1, "a"), mask(0, 0, "b"), mask(0, "evaluation", "a")}) == 5


def test_every_unit_is_hidden_as_often_as_any_other() -> None:
    share = np.mean([draw_hidden((4, 4), 0.6, Draw(0, 0, str(i))) for i in range(3000)], axis=0)
    # 10 of 16; five standard deviations of a share of 3000.
    assert abs(share - 10 / 16).max() < 5 * math.sqrt(0.625 * 0.375 / 3000)


def test_masks_and_crops_belong_to_the_sample_not_to_the_rank(tmp_path: Path) -> None:
    write_shards(islice(fashion_mnist("train"), 16), tmp_path / "s", samples_per_shard=4, made_by="a test")
    shards = read_shard_set(str(tmp_path / "s" / "*.tar"))
    task = SimMIMTask(config(1))

    def read(world_size: int, micro_batch_size: int) -> dict[int, tuple[bytes, ...]]:
        """Everything that was made of a sample, by its drop-path key, which is the sample's own."""
        found = {}
        for rank in range(world_size):
            order = Order.of(shards.sizes, 0, True, 2)
            dataset = PositionDataset(ShardReader(shards), order, task.training_sample, skip_damaged=False)
            share = Share(8, micro_batch_size, rank, world_size, 0, 1, 2**20, task.sample_bytes)
            for batch in training_batches(dataset, share, 0, 2):
                arrays = batch.arrays
                for i, key in enumerate(arrays["drop_keys"].tolist()):
                    found[key] = tuple(arrays[name][i].numpy().tobytes() for name in ("images", "hidden"))
        return found

    wanted = read(1, 8)
    assert len(wanted) == 16
    assert read(1, 2) == read(2, 4) == read(4, 2) == wanted


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_bytes_of_the_models_shape(channels: int) -> None:
    task = SimMIMTask(config(channels, model={"image_size": (32, 48)}))
    for make in (task.training_sample, task.evaluation_sample):
        sample = make(record(channels), Draw(0, 0, "a"))
        assert sample["images"].shape == (channels, 32, 48)
        assert sample["images"].dtype == np.uint8
        assert sample["hidden"].shape == (4, 6)
        assert sample["hidden"].dtype == np.bool_
        assert sample["drop_keys"].shape == ()
        assert sample["drop_keys"].dtype == np.int64


def test_half_of_the_samples_are_flipped_left_to_right() -> None:
    task = SimMIMTask(config(1, task={"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}))
    source = record(1, size=(32, 32))
    with Image.open(io.BytesIO(source.files["png"])) as image:
        pixels = np.asarray(image)
    num_flipped = 0
    for i in range(200):
        found = task.training_sample(source, Draw(0, 0, str(i)))["images"][0]
        is_flipped = np.array_equal(found, pixels[:, ::-1])
        assert is_flipped or np.array_equal(found, pixels)
        num_flipped += is_flipped
    assert 65 < num_flipped < 135  # five standard deviations of 200 coins


def test_evaluation_samples_are_central_crops_whatever_the_draw() -> None:
    task = SimMIMTask(config(3))
    source = record(3, size=(40, 32))
    with Image.open(io.BytesIO(source.files["png"])) as image:
        middle = np.asarray(image)[:, 4:36].transpose(2, 0, 1)
    for i in range(3):
        assert np.array_equal(task.evaluation_sample(source, Draw(0, "evaluation", str(i)))["images"], middle)


# --- target and loss --------------------------------------------------------------------------------------------------


def local_target(pixels: np.ndarray, window: int) -> np.ndarray:
    """Each pixel less the mean of its window and over its deviation, in float64, one pixel at a time."""
    height, width = pixels.shape
    reach = window // 2
    out = np.empty(pixels.shape)
    for y in range(height):
        for x in range(width):
            near = pixels[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
            out[y, x] = (pixels[y, x] - near.mean()) / math.sqrt(near.var(ddof=1) + 1e-6)
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("window", [3, 7, 31])
def test_a_normalised_target_is_each_pixel_against_its_own_window(window: int, channels: int) -> None:
    run = config(channels, task={"target_norm_window": window})
    model = fresh(run)
    pixels = model.normalised(batch_of(run, 2).arrays["images"])
    found = model.target(pixels)
    for sample in range(2):
        for channel in range(channels):
            wanted = local_target(pixels[sample, channel].double().numpy(), window)
            # Float32 means and squares of numbers up to 4, over deviations of some 0.5 and more.
            assert abs(found[sample, channel].numpy() - wanted).max() < 1e-4


def test_a_flat_image_has_a_target_near_zero() -> None:
    run = config(3, task={"target_norm_window": 7})
    model = fresh(run)
    images = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    # Differences of one float32 rounding (2e-7 at 2) over sqrt(1e-6) and more.
    assert model.target(model.normalised(images)).abs().max() < 1e-2


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_the_mean_error_of_hidden_pixels_alone(channels: int, window: int) -> None:
    run = config(channels, model={"image_size": (32, 48)}, task={"target_norm_window": window})
    model = lively(run)
    batch = batch_of(run, 2)
    images, hidden = batch.arrays["images"], batch.arrays["hidden"]
    with torch.no_grad():
        losses, prediction = model(images, hidden, decode_all=True)
    for sample in range(2):
        errors = []
        for channel in range(channels):
            pixels = images[sample, channel].double().numpy() / 255
            pixels = (pixels - run.data.pixel_mean[channel]) / run.data.pixel_std[channel]
            target = local_target(pixels, window) if window else pixels
            errors += [
                abs(target[y, x] - float(prediction[sample, channel, y, x]))
                for y in range(32)
                for x in range(48)
                if hidden_at(hidden, sample, y, x, 8)
            ]
        # Float32 sums of some 1000 terms.
        assert float(losses[sample]) == pytest.approx(np.mean(errors), rel=1e-4)


def test_the_loss_of_a_batch_is_the_mean_of_its_samples_each_as_if_alone() -> None:
    run = config(3, task={"target_norm_window": 5})
    task, model, batch = SimMIMTask(run), lively(run), batch_of(run, 4)
    with torch.no_grad():
        alone = [
            float(task.loss(model, Batch({name: array[i : i + 1] for name, array in batch.arrays.items()}, 0)))
            for i in range(4)
        ]
        together = float(task.loss(model, batch))
    # The batch size of float32 matrix products differs.
    assert together == pytest.approx(np.mean(alone), rel=1e-5)
    assert len({round(value, 4) for value in alone}) > 1


def loss_and_gradients(model: SimMIM, batch: Batch, decode_all: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Each sample's loss, and the gradient of their weighted sum by name."""
    model.zero_grad()
    losses, _ = model(batch.arrays["images"], batch.arrays["hidden"], decode_all=decode_all)
    (losses * torch.arange(1.0, 1 + len(losses))).sum().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("unit", "image_size"), [(8, (32, 48)), (16, (32, 64)), (24, (48, 72)), (4, (32, 48)), (12, (24, 48))]
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("window", [0, 5])
def test_hidden_units_alone_decoded_give_the_loss_and_gradients_of_all(
    window: int, channels: int, unit: int, image_size: tuple[int, int]
) -> None:
    # A token of the last stage is 8 px: one, 2 x 2 and 3 x 3 of them in a unit, then units that cut through tokens.
    task = {"mask_patch_size": unit, "target_norm_window": window}
    run = config(channels, model={"image_size": image_size}, task=task)
    model, batch = lively(run), batch_of(run)
    # Float64: sums of some thousand terms in another order. Float32: the same, and matrix products of another size
    # (found: 2.5e-5).
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-5)):
        model.to(dtype)
        losses, gradients = loss_and_gradients(model, batch, decode_all=False)
        wanted, wanted_gradients = loss_and_gradients(model, batch, decode_all=True)
        assert losses.dtype == dtype
        assert ((losses - wanted).abs() <= tolerance * wanted).all()
        assert gradients.keys() == wanted_gradients.keys() == dict(model.named_parameters()).keys()
        for name, gradient in gradients.items():
            difference = (gradient - wanted_gradients[name]).norm()
            assert difference <= tolerance * wanted_gradients[name].norm(), name


def test_the_head_sees_hidden_tokens_alone_where_none_is_partly_hidden() -> None:
    seen = []
    for unit, kept in ((8, 15), (16, 16), (4, 24)):  # 15 of 24 units, 4 of 6 units of 4 tokens, all 24 tokens
        run = config(3, model={"image_size": (32, 48)}, task={"mask_patch_size": unit})
        model, batch = lively(run), batch_of(run)
        model.decoder.get_submodule("0").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        _, prediction = model(batch.arrays["images"], batch.arrays["hidden"])
        assert seen.pop()[2:].numel() == kept
        assert (prediction is None) == (unit >= 8)


def test_evaluation_sums_weigh_the_samples() -> None:
    run = config(3)
    task, model, batch = SimMIMTask(run), lively(run), batch_of(run, 4)
    with torch.no_grad():
        losses, _ = model(batch.arrays["images"], batch.arrays["hidden"])
        batch.arrays["weight"] = torch.tensor([1.0, 0.0, 1.0, 0.0])
        sums = task.evaluation_sums(model, batch)
    assert sums.dtype == torch.float64
    # A float64 sum of the same two float32 numbers.
    assert sums.tolist() == pytest.approx([float(losses[0].double() + losses[2].double()), 2.0], rel=1e-12)


def test_the_prediction_cannot_see_hidden_pixels() -> None:
    run = config(3)
    model, batch = lively(run), batch_of(run)
    images, hidden = batch.arrays["images"], batch.arrays["hidden"]
    pixels_hidden = hidden.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    with torch.no_grad():
        prediction = model(images, hidden, decode_all=True)[1]
        without = model(torch.where(pixels_hidden, 0, images), hidden, decode_all=True)[1]
        otherwise = model(torch.where(pixels_hidden, images, 0), hidden, decode_all=True)[1]
    assert torch.equal(prediction, without)
    assert not torch.equal(prediction, otherwise)


def test_the_mask_token_stands_at_hidden_tokens_and_only_there() -> None:
    run = config(3)
    model, batch = lively(run), batch_of(run, 1)
    seen = []
    handle = model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(batch.arrays["images"], batch.arrays["hidden"])
        embedded, map_size = model.encoder.patch_embed(model.normalised(batch.arrays["images"]))
    handle.remove()
    assert map_size == (8, 8)
    for token in range(64):
        is_hidden = hidden_at(batch.arrays["hidden"], 0, token // 8, token % 8, 2)  # a unit is 2 x 2 tokens
        wanted = model.mask_token[0, 0] if is_hidden else embedded[0, token]
        assert torch.equal(seen[0][0, token], wanted)


def test_each_token_of_the_last_stage_draws_its_own_square_of_pixels() -> None:
    run = config(3)
    model, batch = lively(run), batch_of(run, 1)
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.decoder[0].bias.copy_(torch.arange(3 * 64.0))
        _, prediction = model(batch.arrays["images"], batch.arrays["hidden"], decode_all=True)
    square = torch.arange(3 * 64.0).view(3, 8, 8)  # stride 8: a channel's pixels row by row
    assert torch.equal(prediction[0], square.repeat(1, 4, 4))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("window", [0, 31])
def test_the_first_gradient_of_a_fresh_model_is_small_and_finite(channels: int, window: int) -> None:
    run = config(channels, task={"target_norm_window": window})
    task, model = SimMIMTask(run), fresh(run)
    loss = task.loss(model, batch_of(run))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    # G clips at 100; a mask token of zeros gives 1e17 here.
    assert 0 < norm < 100
    assert 0 < loss < 10


def test_every_parameter_but_those_behind_zero_gains_gets_a_gradient() -> None:
    run = config(3)
    model = lively(run)
    SimMIMTask(run).loss(model, batch_of(run)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_drop_path_is_used_in_training_and_not_in_evaluation() -> None:
    run = config(3, model={"drop_path_rate": 0.9})
    task, model, batch = SimMIMTask(run), lively(run), batch_of(run, 4)
    with torch.no_grad():
        dropped = [float(task.loss(model, batch)) for _ in range(2)]
        plain = float(task.evaluation_sums(model, batch)[0] / 4)
        undropped = float(SimMIMTask(config(3)).loss(lively(config(3)), batch))
    assert dropped[0] == dropped[1]  # drawn from the batch's keys
    assert dropped[0] != pytest.approx(plain, rel=1e-4)
    # A mean in float64 of losses that were float32.
    assert plain == pytest.approx(undropped, rel=1e-6)


def test_parameter_names_are_those_of_the_released_code() -> None:
    names = {name for name, _ in fresh(config(3)).named_parameters()}
    assert {"encoder.patch_embed.proj.weight", "mask_token", "decoder.0.weight", "decoder.0.bias"} <= names
    assert {name.split(".")[0] for name in names} == {"encoder", "mask_token", "decoder"}
    assert "encoder.layers.0.blocks.0.attn.cpb_mlp.0.weight" in names
    assert "encoder.layers.0.downsample.reduction.weight" in names


# --- panel ------------------------------------------------------------------------------------------------------------


def copies(picture: np.ndarray, cell: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
    """Where in a picture a cell is found, looking only at the pixels that count."""
    height, width = counts.shape
    places = []
    ys, xs = np.nonzero(counts)
    probe = slice(None, None, 37)
    for y in range(picture.shape[0] - height + 1):
        for x in range(picture.shape[1] - width + 1):
            if np.array_equal(picture[y + ys[probe], x + xs[probe]], cell[ys[probe], xs[probe]]) and np.array_equal(
                picture[y : y + height, x : x + width][counts], cell[counts]
            ):
                places.append((y, x))
    return places


@pytest.mark.parametrize("window", [0, 31])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_panel_shows_visible_pixels_as_they_are_in_all_three_columns(channels: int, window: int) -> None:
    run = config(channels, task={"target_norm_window": window})
    model, batch = lively(run), batch_of(run, 2)
    with torch.no_grad():
        image = SimMIMTask(run).panel(model, batch, "a title")
    assert image.mode == "RGB"
    # 32 px at three times their size: three cells of 96 and a row for each of two samples, 4 px between, 34 above.
    assert image.size == (3 * (96 + 4) + 8, 34 + 2 * (96 + 4))
    picture = np.asarray(image)
    columns = []
    for sample in range(2):
        pixels = batch.arrays["images"][sample].numpy().transpose(1, 2, 0)
        cell = np.broadcast_to(pixels, (32, 32, 3)).repeat(3, 0).repeat(3, 1)
        visible = ~batch.arrays["hidden"][sample].numpy().repeat(24, 0).repeat(24, 1)
        places = copies(picture, cell, visible)
        assert len(places) == 3
        assert len({y for y, _ in places}) == 1
        columns.append([x for _, x in places])
        original, masked, reconstruction = (picture[y : y + 96, x : x + 96] for y, x in places)
        assert np.array_equal(original, cell)
        assert (masked[~visible] == 128).all()
        assert not np.array_equal(reconstruction[~visible], original[~visible])
    assert columns[0] == columns[1]


def test_a_panel_of_a_perfect_model_reconstructs_the_original() -> None:
    run = config(3)
    batch = batch_of(run, 1)

    class Perfect(torch.nn.Module):
        """Predicts the normalised pixels."""

        def forward(self, images: Tensor, hidden: Tensor, decode_all: bool) -> tuple[Tensor, Tensor]:
            assert decode_all
            return torch.zeros(len(images)), fresh(run).normalised(images)

    picture = np.asarray(SimMIMTask(run).panel(Perfect(), batch, ""))
    cell = batch.arrays["images"][0].numpy().transpose(1, 2, 0).repeat(3, 0).repeat(3, 1)
    # The original and the reconstruction: normalising and back is exact after rounding to a byte.
    assert len(copies(picture, cell, np.ones((96, 96), bool))) == 2


@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_a_panel_of_more_than_four_images_has_two_blocks(count: int) -> None:
    run = config(1)
    with torch.no_grad():
        image = SimMIMTask(run).panel(fresh(run), batch_of(run, count), "a title")
    blocks = 1 if count <= 4 else 2
    assert image.size == (308 * blocks, 34 + 100 * math.ceil(count / blocks))
