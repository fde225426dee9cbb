"""timm, Hugging Face and torchvision with our weights: an oracle for the key maps, written apart from the package's.

Nothing in a peer is changed: each is built in float32 as its users build it, so that its buffers (the coordinates of
the position bias among them) hold float32 values, and is then cast to float64 as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from transformers import Swinv2Config, Swinv2ForImageClassification

from swinv2_scale.geometry import as_size
from tests.parity.cases import NUM_CLASSES, Case, Result, peer_result, random_images, weights_of

#: One of our tensors -> a peer's tensors by name. Linear, so that it takes gradients as it takes weights.
Translation = Callable[[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Peer:
    """A library's Swin V2."""

    package: str
    build: Callable[[Case], nn.Module]
    translate: Translation
    outputs: Callable[[nn.Module, Tensor], dict[str, Tensor]]
    #: Buffers that a state dict of the peer holds and we don't.
    regenerated: tuple[str, ...] = ()

    def translated(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of our tensors under the peer's names; parts that several of ours make together are added up."""
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            for theirs, value in self.translate(name, tensor).items():
                out[theirs] = out[theirs] + value if theirs in out else value
        return out

    def model(self, case: Case, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """In float64, with our random weights unless some are given; every key must find its place."""
        model = self.build(case).double().eval()
        missing, unexpected = model.load_state_dict(
            self.translated(weights_of(case) if weights is None else weights), strict=False
        )
        assert not unexpected
        assert all(name.endswith(self.regenerated or "/") for name in missing), missing
        return model

    def result(self, case: Case) -> Result:
        model = self.model(case)
        return peer_result(model, self.outputs(model, random_images(case)))

    def in_its_names(self, ours: Result) -> Result:
        """Our result with gradients named and cut as the peer's."""
        return Result(ours.outputs, self.translated(ours.gradients))


# --- timm -------------------------------------------------------------------------------------------------------------


def build_timm(case: Case, **fields: object) -> nn.Module:
    return SwinTransformerV2(
        img_size=case.model_image,
        num_classes=NUM_CLASSES,
        **case.shape,
        pretrained_window_sizes=case.pretrained or (0,) * len(case.depths),
        drop_path_rate=0.0,
        **fields,
    )


def to_timm(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Merging belongs to the stage that it leads to; the head has a name of its own."""
    name = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", name)
    return {re.sub(r"^head\.", "head.fc.", name): tensor}


def timm_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    x, levels = model.forward_intermediates(images, norm=True)
    features = model.forward_head(x, pre_logits=True)
    outputs = {f"level {stage}": level for stage, level in enumerate(levels)}
    return {**outputs, "features": features, "logits": model.head.fc(features)}


# --- Hugging Face -----------------------------------------------------------------------------------------------------

_HF_NAMES = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^patch_embed\.norm", "embeddings.norm"),
    (r"^mask_token", "embeddings.mask_token"),
    (r"^layers\.", "encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.logit_scale", ".attention.self.logit_scale"),
    (r"\.attn\.cpb_mlp\.", ".attention.self.continuous_position_bias_mlp."),
    (r"\.attn\.q_bias", ".attention.self.query.bias"),
    (r"\.attn\.v_bias", ".attention.self.value.bias"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
)


def hf_config(case: Case) -> Swinv2Config:
    return Swinv2Config(
        image_size=case.model_image[0] if len(set(case.model_image)) == 1 else case.model_image,
        **case.shape,
        pretrained_window_sizes=case.pretrained or (0,) * len(case.depths),
        drop_path_rate=0.0,
        encoder_stride=case.patch << (len(case.depths) - 1),
        num_labels=NUM_CLASSES,
    )


def to_hf(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values apart; everything but the head and the decoder below ``swinv2``."""
    name = name.removeprefix("encoder.")
    if name.startswith(("head.", "decoder.")):
        return {name.replace("head.", "classifier."): tensor}
    if name.endswith(".attn.qkv.weight"):
        stem = "swinv2.encoder." + name.replace(".attn.qkv.weight", ".attention.self")
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"{stem}.{part}.weight": value for part, value in parts}
    for pattern, replacement in _HF_NAMES:
        name = re.sub(pattern, replacement, name)
    return {"swinv2." + name: tensor}


def hf_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The encoder's own record of its stages (before merging), as Swinv2Backbone takes it; the last one normalised."""
    backbone = model.swinv2
    tokens, map_size = backbone.embeddings(images)
    encoded = backbone.encoder(
        tokens, map_size, output_hidden_states=True, output_hidden_states_before_downsampling=True
    )
    levels = list(encoded.reshaped_hidden_states[1:])
    levels[-1] = backbone.layernorm(levels[-1].movedim(1, -1)).movedim(-1, 1)
    features = backbone.pooler(backbone.layernorm(encoded.last_hidden_state).transpose(1, 2)).flatten(1)
    outputs = {f"level {stage}": level for stage, level in enumerate(levels)}
    return {**outputs, "features": features, "logits": model.classifier(features)}


# --- torchvision ------------------------------------------------------------------------------------------------------


def build_torchvision(case: Case) -> nn.Module:
    return SwinTransformer(
        [case.patch] * 2,
        case.embed_dim,
        list(case.depths),
        list(case.heads),
        list(as_size(case.window, 2)),
        stochastic_depth_prob=0.0,
        num_classes=NUM_CLASSES,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )


def to_torchvision(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One flat row of embedding, stage, merging, stage, ..; one bias for queries, keys (zeros) and values."""
    if name.startswith(("norm.", "head.")):
        return {name: tensor}
    if name.startswith("patch_embed."):
        return {name.replace("patch_embed.proj", "features.0.0").replace("patch_embed.norm", "features.0.2"): tensor}
    match = re.match(r"layers\.(\d+)\.(blocks|downsample)\.(.*)", name)
    assert match is not None
    place = 2 * int(match[1]) + (1 if match[2] == "blocks" else 2)
    rest = match[3].replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
    if rest.endswith(("q_bias", "v_bias")):
        zeros = torch.zeros_like(tensor)
        parts = (tensor, zeros, zeros) if rest.endswith("q_bias") else (zeros, zeros, tensor)
        return {f"features.{place}.{rest[:-6]}qkv.bias": torch.cat(parts)}
    return {f"features.{place}.{rest}": tensor}


def torchvision_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    x, levels = images, []
    for place, part in enumerate(model.features):
        x = part(x)
        if place % 2:
            levels.append(x)
    levels[-1] = model.norm(x)
    features = model.flatten(model.avgpool(model.permute(levels[-1])))
    outputs = {f"level {stage}": level.movedim(-1, 1) for stage, level in enumerate(levels)}
    return {**outputs, "features": features, "logits": model.head(features)}


TIMM = Peer("timm", build_timm, to_timm, timm_outputs)
#: Built to take any size of image.
TIMM_ANY_SIZE = Peer("timm", partial(build_timm, dynamic_img_size=True), to_timm, timm_outputs)
HUGGING_FACE = Peer("transformers", lambda case: Swinv2ForImageClassification(hf_config(case)), to_hf, hf_outputs)
TORCHVISION = Peer(
    "torchvision",
    build_torchvision,
    to_torchvision,
    torchvision_outputs,
    ("relative_coords_table", "relative_position_index"),
)
