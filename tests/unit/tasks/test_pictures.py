"""Pictures of a classifier: their sizes, their colours, and names that nobody foresaw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from swinv2_scale.data.loader import Batch
from swinv2_scale.tasks.classification import ClassificationTask
from swinv2_scale.tasks.pictures import draw_confusion, draw_gallery, shown
from tests.unit.tasks.test_classification import config, pixels_of

WHITE, BLUE, RED = (255, 255, 255), (21, 101, 192), (198, 40, 40)
GREEN_EDGE, RED_EDGE = (0x2F, 0x7D, 0x32), (0xC6, 0x28, 0x28)
ODD = [
    "",
    "a\nb\tc",
    "\x00\x1b[31m",
    "\udc80\udcff",
    "名前" * 40,
    "e\u0301" * 300,
    "עברית",
    "🦉" * 50,
    "w" * 10_000,
    "<b>",
]


def numbered(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def painted(picture: Image.Image, *colours: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of all pixels of these colours."""
    pixels = np.asarray(picture)
    ys, xs = np.nonzero(np.any([(pixels == colour).all(-1) for colour in colours], axis=0))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def confused(count: int) -> NDArray[np.float64]:
    """The first and the last class are always taken for each other, the others are always right."""
    matrix = np.diag(np.full(count, 10.0))
    matrix[[0, -1]] = matrix[[-1, 0]]
    return matrix


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "cell"), [(2, 44), (10, 44), (60, 15), (1000, 1)])
def test_a_matrix_is_a_square_of_blue_hits_and_red_mistakes(count: int, cell: int) -> None:
    matrix = confused(count)
    picture = draw_confusion(matrix, numbered(count), "a title")
    left, top, right, bottom = painted(picture, BLUE, RED)
    assert (right - left, bottom - top) == (cell * count, cell * count)
    # Beside the square is the list of mistakes, 13 lines of 19 px.
    assert picture.size == (right + 3 * 8 + 380, top + max(cell * count, 13 * 19) + 8)
    pixels = np.asarray(picture)
    for row, column in {(0, 0), (0, count - 1), (1, 1), (count - 1, 0), (count - 1, count - 1)}:
        wanted = WHITE if matrix[row, column] == 0 else BLUE if row == column else RED
        assert tuple(pixels[top + row * cell, left + column * cell]) == wanted  # a corner: shares stand in the middle
        assert tuple(pixels[top + (row + 1) * cell - 1, left + (column + 1) * cell - 1]) == wanted


def test_rare_mistakes_are_seen_and_frequent_ones_are_darker() -> None:
    matrix = np.diag([1000.0] * 60)
    matrix[0, 1:4] = (1, 10, 100)
    picture = np.asarray(draw_confusion(matrix, numbered(60), "")).astype(int)
    # 60 classes have no names: the square begins 24 px from the left and 48 from the top, cells are 15 px.
    none, one, ten, hundred = (int(picture[50, 26 + 15 * column, 1]) for column in (10, 1, 2, 3))
    assert none == 255
    assert none - 5 > one > ten > hundred


def test_a_class_without_samples_is_an_empty_row() -> None:
    matrix = confused(3)
    matrix[1] = 0
    picture = draw_confusion(matrix, numbered(3), "")
    left, top, right, _ = painted(picture, BLUE, RED)
    assert (np.asarray(picture)[top + 44 : top + 88, left:right] == 255).all()
    assert draw_confusion(np.zeros((3, 3)), numbered(3), "").size == picture.size


@pytest.mark.parametrize("count", [2, 4, 5, 10, 40, 41])
def test_nothing_is_cut_off_at_the_borders(count: int) -> None:
    """With a dozen mistakes between classes of the widest names."""
    matrix = np.ones((count, count)) + np.arange(count * count).reshape(count, count)
    picture = np.asarray(draw_confusion(matrix, ["W" * 100] * count, "W" * 1000))
    for border in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (border == 255).all()


def test_the_mistakes_in_words_begin_with_the_most_frequent() -> None:
    """The first line is that of a matrix with this mistake alone; then come three others, and no more."""
    many = np.array([[50.0, 1, 2], [0, 90, 30], [0, 5, 50]])
    alone = np.array([[53.0, 0, 0], [0, 90, 30], [0, 0, 55]])
    top = painted(draw_confusion(confused(3), numbered(3), ""), BLUE, RED)[1]
    lists = [np.asarray(draw_confusion(m, numbered(3), ""))[top:, -380:] for m in (many, alone, np.eye(3))]
    of_many, of_one, of_none = ([part[19 * n : 19 * (n + 1)] for n in range(13)] for part in lists)
    assert np.array_equal(of_many[1], of_one[1])
    for lines, count in ((of_many, 5), (of_one, 2), (of_none, 1)):  # the first is the heading
        assert [bool((line != 255).any()) for line in lines] == [n < count for n in range(13)]


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_gallery_shows_images_in_rows_of_four(channels: int, count: int, columns: int, rows: int) -> None:
    images = pixels_of(count)[:, :channels]
    picture = draw_gallery(images, [("a", "b", True)] * count, "a title")
    # 32 px at five times their size, 8 px between, 28 for the title, 40 below each for two lines.
    assert picture.size == (columns * 168 + 8, 28 + rows * 208)
    pixels = np.asarray(picture)
    for number in range(count):
        x, y = 8 + number % 4 * 168, 28 + number // 4 * 208
        wanted = images[number].permute(1, 2, 0).numpy().repeat(5, 0).repeat(5, 1)
        assert np.array_equal(pixels[y : y + 160, x : x + 160], np.broadcast_to(wanted, (160, 160, 3)))


@pytest.mark.parametrize(("height", "width"), [(32, 48), (384, 384), (5, 300)])
def test_images_of_any_shape_keep_it(height: int, width: int) -> None:
    images = torch.zeros((2, 3, height, width), dtype=torch.uint8)
    picture = draw_gallery(images, [("a", "b", True)] * 2, "")
    zoom = max(1, 160 // max(height, width))
    left, top, right, bottom = painted(picture, (0, 0, 0))
    assert (bottom - top, left, top) == (height * zoom, 8, 28)
    assert right == 8 + max(width * zoom, 160) + 8 + width * zoom


def test_a_panel_edges_what_is_right_in_green_and_what_is_wrong_in_red() -> None:
    class First(nn.Module):
        """Takes everything for the first class."""

        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[3.0, 0.0]]).expand(len(images), 2)

    images = pixels_of(2)
    batch = Batch({"images": images, "labels": torch.tensor([0, 1])}, 0)
    picture = np.asarray(ClassificationTask(config(2)).panel(First(), batch, "a title"))
    for number, edge in enumerate((GREEN_EDGE, RED_EDGE)):
        x, y = 8 + number * 168, 28
        assert (picture[y - 1, x - 1 : x + 161] == edge).all()
        assert (picture[y - 1 : y + 161, x + 160] == edge).all()


def test_images_of_eight_bits_are_shown_as_they_are_and_others_around_mid_grey() -> None:
    images = pixels_of(2)
    assert torch.equal(shown(images, images.float()), images)
    normalised = torch.tensor([-9.0, -3.0, 0.0, 1.5, 3.0, 9.0]).reshape(1, 1, 2, 3)
    found = shown(torch.zeros(1, 1, 2, 3), normalised)
    assert found.dtype == torch.uint8
    assert found.flatten().tolist() == [0, 0, 128, 191, 255, 255]
    assert shown(torch.zeros(1, 1, 2, 3, dtype=torch.uint16), normalised).flatten().tolist()[2] == 128
    many = torch.zeros(2, 5, 4, 4)  # channels of a satellite: the first
    assert shown(many, many).shape == (2, 1, 4, 4)


# --- names ------------------------------------------------------------------------------------------------------------


def test_odd_names_are_drawn_in_their_place() -> None:
    matrix = np.ones((len(ODD), len(ODD)))
    picture = draw_confusion(matrix, ODD, "\udc80 a title\n of two lines")
    assert picture.width < 1100  # a name takes 140 px at most
    gallery = draw_gallery(pixels_of(len(ODD)), [(name, name, False) for name in ODD], "\udc80\n")
    assert gallery.size == draw_gallery(pixels_of(len(ODD)), [("a", "b", True)] * len(ODD), "").size


def test_long_captions_end_before_the_next_image() -> None:
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    picture = np.asarray(draw_gallery(images, [("W" * 300, "W" * 300, True), ("", "", True)], ""))
    below = picture[28 + 162 :]
    assert (below[:, 8 : 8 + 160] < 255).any()
    assert (below[:, 8 + 161 :] == 255).all()


def test_a_long_name_leaves_the_share_in_sight() -> None:
    class Sure(nn.Module):
        """Certain to different degrees."""

        def __init__(self, logit: float) -> None:
            super().__init__()
            self.logit = logit

        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[self.logit, 0.0]]).expand(len(images), 2)

    task = ClassificationTask(config(2))
    task.labels = ("W" * 300, "dog")
    batch = Batch({"images": pixels_of(1), "labels": torch.tensor([0])}, 0)
    unsure, sure = (np.asarray(task.panel(Sure(logit), batch, "")) for logit in (0.1, 9.0))
    assert not np.array_equal(unsure, sure)
