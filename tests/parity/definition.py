"""Swin V2 token by token from its definition: slow, differentiable, and apart from the package's geometry and tiles.

Tokens are a dictionary from (row, column) to (B, C). What one token does on its own (a linear layer, a norm) is applied
to all of them at once; wherever tokens meet (patches, windows, merging, pooling) they are taken one by one. Windows are
written as the released code makes them: pad to whole windows, roll by the shift, cut, and let nobody look across a
border of the map or at padding. Sources: arXiv 2111.09883 sec. 3; the released code for what the paper leaves out
(factor 8 and base 8 of the log, 16 * sigmoid, no key bias, reduction before the norm).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tests.parity.cases import Case, Result, objective, random_images, weights_of

Place = tuple[int, int]
Tokens = dict[Place, Tensor]
Weights = dict[str, Tensor]


def definition_result(case: Case) -> Result:
    """Outputs and gradients of the definition, with our random weights."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights_of(case).items()}
    outputs = classify(case, leaves, random_images(case))
    gradients = torch.autograd.grad(objective(outputs["logits"]), list(leaves.values()), materialize_grads=True)
    return Result({name: x.detach() for name, x in outputs.items()}, dict(zip(leaves, gradients, strict=True)))


def classify(case: Case, weights: Weights, images: Tensor) -> dict[str, Tensor]:
    """Images -> the map of every stage (the last one normalised), pooled features, logits."""
    levels = encode(case, weights, embed(case, weights, images))
    features = sum(levels[-1].values()) / len(levels[-1])
    assert isinstance(features, Tensor)
    outputs = {f"level {stage}": as_map(tokens) for stage, tokens in enumerate(levels)}
    return {**outputs, "features": features, "logits": linear(weights, "head", features)}


def simmim_prediction(case: Case, weights: Weights, images: Tensor, hidden: set[Place]) -> Tensor:
    """(B, C_in, H, W): what SimMIM predicts for every pixel when the tokens at ``hidden`` are replaced by the token.

    ``weights`` has mask_token and decoder.0 beside the encoder's.
    """
    tokens = embed(case, weights, images)
    for place in hidden:
        tokens[place] = weights["mask_token"][0].expand_as(tokens[place])
    last = encode(case, weights, tokens)[-1]
    stride = case.patch * 2 ** (len(case.depths) - 1)
    matrix, bias = weights["decoder.0.weight"].flatten(1), weights["decoder.0.bias"]
    made = {place: token @ matrix.T + bias for place, token in last.items()}
    prediction = torch.empty_like(images)
    for channel in range(images.shape[1]):
        for y in range(images.shape[2]):
            for x in range(images.shape[3]):
                number = (channel * stride + y % stride) * stride + x % stride
                prediction[:, channel, y, x] = made[y // stride, x // stride][:, number]
    return prediction


def embed(case: Case, weights: Weights, images: Tensor) -> Tokens:
    """One token a patch; pixels beyond the image are zero."""
    height, width = images.shape[2:]
    tokens = {}
    for y in range(-(-height // case.patch)):
        for x in range(-(-width // case.patch)):
            patch = images.new_zeros(*images.shape[:2], case.patch, case.patch)
            part = images[:, :, y * case.patch : (y + 1) * case.patch, x * case.patch : (x + 1) * case.patch]
            patch[:, :, : part.shape[2], : part.shape[3]] = part
            tokens[y, x] = patch.flatten(1)
    matrix, bias = weights["patch_embed.proj.weight"].flatten(1), weights["patch_embed.proj.bias"]
    return each(lambda patches: layer_norm(weights, "patch_embed.norm", patches @ matrix.T + bias), tokens)


def encode(case: Case, weights: Weights, tokens: Tokens) -> list[Tokens]:
    """The tokens of every stage, the last ones normalised."""
    levels = []
    number = 0  # of the block in the whole model
    for stage, depth in enumerate(case.depths):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            branch = attention(case, weights, name + ".attn", stage, block % 2 == 1, tokens)
            branch = each(lambda x, name=name: layer_norm(weights, name + ".norm1", x), branch)
            tokens = {place: token + branch[place] for place, token in tokens.items()}
            tokens = each(lambda x, name=name: x + layer_norm(weights, name + ".norm2", mlp(weights, name, x)), tokens)
            number += 1
            counted = number if case.extra_norm_counter == "model" else block + 1
            if case.extra_norm_every and counted % case.extra_norm_every == 0:
                tokens = each(lambda x, name=name: layer_norm(weights, name + ".norm3", x), tokens)
        levels.append(tokens)
        if stage + 1 < len(case.depths):
            tokens = merge(weights, f"layers.{stage}.downsample", tokens)
    levels[-1] = each(lambda x: layer_norm(weights, "norm", x), tokens)
    return levels


def merge(weights: Weights, name: str, tokens: Tokens) -> Tokens:
    """Four neighbours become one token; beyond an odd map's last row or column there are zeros."""
    height, width = size_of(tokens)
    zero = torch.zeros_like(tokens[0, 0])
    merged = {}
    for y in range(-(-height // 2)):
        for x in range(-(-width // 2)):
            order = ((2 * y, 2 * x), (2 * y + 1, 2 * x), (2 * y, 2 * x + 1), (2 * y + 1, 2 * x + 1))
            merged[y, x] = torch.cat([tokens.get(place, zero) for place in order], -1)
    matrix = weights[name + ".reduction.weight"]
    return each(lambda x: layer_norm(weights, name + ".norm", x @ matrix.T), merged)


# --- attention --------------------------------------------------------------------------------------------------------


def attention(case: Case, weights: Weights, name: str, stage: int, shifted: bool, tokens: Tokens) -> Tokens:
    """Every token looks at the tokens of its window: softmax(scale * cos(q, k) + bias) v, and a projection."""
    places = list(tokens)
    num_heads = case.heads[stage]
    stacked = torch.stack([tokens[place] for place in places], 1)
    query_matrix, key_matrix, value_matrix = weights[name + ".qkv.weight"].chunk(3)
    heads = (*stacked.shape[:2], num_heads, -1)
    queries = unit((stacked @ query_matrix.T + weights[name + ".q_bias"]).view(heads))
    keys = unit((stacked @ key_matrix.T).view(heads))
    values = (stacked @ value_matrix.T + weights[name + ".v_bias"]).view(heads)
    scale = weights[name + ".logit_scale"].clamp(max=math.log(100.0)).exp().view(num_heads)
    windows = list(windows_of(size_of(tokens), window_pair(case), shifted))
    rows, bias = biases(case, weights, name + ".cpb_mlp", stage, windows)
    number = {place: i for i, place in enumerate(places)}
    out: Tokens = {}
    for window in windows:
        indices = torch.tensor([number[place] for place in window])
        window_keys, window_values = keys[:, indices], values[:, indices]  # (B, n, N, D)
        for y, x in window:
            cosines = (queries[:, number[y, x], None] * window_keys).sum(-1)  # (B, n, N)
            look_up = torch.tensor([rows[y - key_y, x - key_x] for key_y, key_x in window])
            exponentials = (cosines * scale + bias[look_up]).softmax(1)
            out[y, x] = (exponentials[..., None] * window_values).sum(1).flatten(1)
    return each(lambda x: linear(weights, name + ".proj", x), {place: out[place] for place in places})


def windows_of(size: Place, window: Place, shifted: bool) -> Iterator[list[Place]]:
    """The tokens that see each other: in one window of the padded and rolled map, and of one region of its mask."""
    members: dict[tuple[Place, Place], list[Place]] = defaultdict(list)
    for y in range(size[0]):
        for x in range(size[1]):
            down, across = label(y, size[0], window[0], shifted), label(x, size[1], window[1], shifted)
            members[down, across].append((y, x))
    yield from members.values()


def label(position: int, length: int, window: int, shifted: bool) -> Place:
    """Window and region of a token along one axis. A map that one window covers is one window and never shifted."""
    if length <= window:
        return 0, 0
    shift = window // 2 if shifted else 0
    padded = math.ceil(length / window) * window
    rolled = (position - shift) % padded
    region = 0 if not shift or rolled < padded - window else 1 if rolled < padded - shift else 2
    return rolled // window, region


def biases(
    case: Case, weights: Weights, name: str, stage: int, windows: list[list[Place]]
) -> tuple[dict[Place, int], Tensor]:
    """Row of every offset that occurs, and (offsets, N) what it adds to a score: 16 * sigmoid(mlp(..))."""
    pairs = ((query, key) for window in windows for query in window for key in window)
    offsets = sorted({(query[0] - key[0], query[1] - key[1]) for query, key in pairs})
    divisors = pretrained_window(case, stage)
    spaced = torch.stack(
        [torch.stack([log_spaced(d, max(side - 1, 1)) for d, side in zip(o, divisors, strict=True)]) for o in offsets]
    )
    hidden = (spaced.to(torch.float64) @ weights[name + ".0.weight"].T + weights[name + ".0.bias"]).clamp(min=0)
    return {offset: row for row, offset in enumerate(offsets)}, 16 / (
        1 + (-hidden @ weights[name + ".2.weight"].T).exp()
    )


def log_spaced(offset: int, divisor: int) -> Tensor:
    """One coordinate in float32, as every implementation has it."""
    scaled = torch.tensor(float(offset)) / divisor * 8
    return torch.sign(scaled) * torch.log2(scaled.abs() + 1) / math.log2(8)


def pretrained_window(case: Case, stage: int) -> Place:
    """Given, or the window that the stage has at the size the model is made for."""
    given = (case.pretrained or (0,) * len(case.depths))[stage]
    if given:
        return given, given
    sides = [-(-length // case.patch) for length in case.model_image]
    for _ in range(stage):
        sides = [-(-side // 2) for side in sides]
    height, width = (min(side, window) for side, window in zip(sides, window_pair(case), strict=True))
    return height, width


def window_pair(case: Case) -> Place:
    return case.window if isinstance(case.window, tuple) else (case.window, case.window)


# --- what a token does on its own -------------------------------------------------------------------------------------


def each(function: Callable[[Tensor], Tensor], tokens: Tokens) -> Tokens:
    """Apply a function of single tokens."""
    done = function(torch.stack(list(tokens.values()), 1))
    return dict(zip(tokens, done.unbind(1), strict=True))


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * weights[name + ".weight"] + weights[name + ".bias"]


def mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    hidden = linear(weights, name + ".mlp.fc1", x)
    return linear(weights, name + ".mlp.fc2", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def size_of(tokens: Tokens) -> Place:
    return max(y for y, _ in tokens) + 1, max(x for _, x in tokens) + 1


def as_map(tokens: Tokens) -> Tensor:
    """(B, C, h, w)."""
    height, width = size_of(tokens)
    return torch.stack([torch.stack([tokens[y, x] for x in range(width)], -1) for y in range(height)], -2)
