"""What activations take, against the storages that torch really keeps while the real model trains.

On CPUs, and on the meta device at sizes that no CPU could hold: the same operations save the same tensors.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import RunConfig
from swinv2_scale.engine import activation_checkpointing
from swinv2_scale.engine.job import TASKS
from swinv2_scale.plan.activations import kept_by_block
from swinv2_scale.plan.peak import Activations, activations
from swinv2_scale.tasks.simmim import SimMIMTask
from tests.support.fused_kernels import needs_fused
from tests.support.live_memory import LiveMemory, saved_bytes

torch.set_num_threads(1)

CONFIGS = Path(__file__).parents[3] / "configs"
COLOUR = ("model.in_channels=3", "data.pixel_mean=[0.5,0.5,0.5]", "data.pixel_std=[0.5,0.5,0.5]")
SHAPES = {
    "two stages": (
        *("model.image_size=64", "model.window_size=8", "model.embed_dim=96", "task.mask_patch_size=8"),
        "data.micro_batch_size=4",
    ),
    "three stages, four tiles a side": (
        *("model.image_size=128", "model.window_size=4", "model.embed_dim=64", "model.depths=[2,2,2]"),
        *("model.num_heads=[2,4,8]", "task.mask_patch_size=16", "data.micro_batch_size=2"),
    ),
    "windows that don't divide, extra norms, one image": (
        *("model.image_size=96", "model.window_size=7", "model.embed_dim=64", "model.depths=[1,3,1]"),
        *("model.num_heads=[2,4,8]", "task.mask_patch_size=16", "data.micro_batch_size=1", "model.extra_norm_every=2"),
    ),
    "one side longer, one head": (
        *("model.image_size=[64,128]", "model.window_size=16", "model.embed_dim=32", "model.num_heads=[1,2]"),
        *("task.mask_patch_size=8", "data.micro_batch_size=2", "model.patch_size=2"),
    ),
}
CLASSES = {
    "few classes": (*SHAPES["two stages"][:3], "data.micro_batch_size=4"),
    "many classes": (
        *("model.image_size=32", "model.window_size=8", "data.micro_batch_size=16"),
        "model.num_classes=20000",
    ),
}
#: Of the larger ones; each of the others is tried with all three.
PRECISIONS = {"three stages, four tiles a side": "bf16_autocast", "one side longer, one head": "bf16"}
BACKENDS = ["eager", "sequential", "sdpa", pytest.param("fused", marks=needs_fused)]
#: Asked for by the plan's promise: within 10 %. Found: 0.4 %, and 4 % with one head, where float32 values are read as
#: they lie and not copied.
KEPT = 0.1
#: Peaks depend on the order in which torch frees and makes temporary tensors. Found: -9 to +11 %; without scores these
#: are more of the whole, with ``fused`` down to -20 %.
PEAK = {False: 0.15, True: 0.22}

GIANT = "stages/giant/simmim_192w12.yaml"
BASE = "stages/base/simmim_192w12.yaml"


def measured(config: RunConfig, device: str) -> tuple[int, int]:
    """(bytes kept from forward to backward, most bytes at once) of one micro-batch; weights and gradients left out."""
    with torch.device(device):
        model = TASKS[config.task.name](config).build_model()
    if config.engine.precision == "bf16":
        model.bfloat16()
    for parameter in model.parameters():
        if device == "cpu":
            torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.zeros_like(parameter)  # there from the micro-batch before
    activation_checkpointing.apply(model, config.engine.activation_checkpointing)
    batch = config.data.micro_batch_size
    height, width = config.model.image_shape
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision == "bf16_autocast")
    gradients = [p.grad for p in model.parameters() if p.grad is not None]

    def inputs() -> list[torch.Tensor | None]:
        images = torch.zeros(batch, config.model.in_channels, height, width, dtype=torch.uint8)
        if config.task.name == "simmim":
            unit = config.task.mask_patch_size
            return [images, torch.zeros(batch, height // unit, width // unit, dtype=torch.bool), torch.arange(batch)]
        return [images, torch.arange(batch), None, None, None, torch.arange(batch)]

    with torch.no_grad(), torch.device(device), autocast:
        model(*inputs())  # the tiles of a map are made once a process, and stay
    with LiveMemory([*model.parameters(), *gradients]) as memory, torch.device(device):
        with autocast:
            found = model(*inputs())
            loss = (found[0] if config.task.name == "simmim" else found).mean()
        del found
        kept = memory.bytes
        loss.backward()
    return kept, memory.peak


@pytest.fixture(autouse=True)
def _torchs_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """zero.Init in an earlier test leaves DeepSpeed's in its place, which keeps no copies that autocast rounded."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def check(config: RunConfig, device: str) -> Activations:
    kept, peak = measured(config, device)
    planned = activations(config, "cpu")
    assert planned.kept == pytest.approx(kept, rel=KEPT)
    assert planned.peak == pytest.approx(peak, rel=PEAK["fused" in config.model.stage_backends])
    return planned


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointing", ["none", "torch"])
@pytest.mark.parametrize(
    ("shape", "precision"),
    [(shape, p) for shape in SHAPES for p in ("fp32", "bf16", "bf16_autocast") if p in PRECISIONS.get(shape, p)],
)
def test_what_is_kept_and_the_most_at_once_are_as_planned(shape, precision, checkpointing, backend):
    fields = ("data.global_batch_size=64", "model.depths=[2,2]", *SHAPES[shape])
    config = load_config(
        CONFIGS / "quickstart" / "simmim.yaml",
        [
            *(*COLOUR, *fields, f"engine.precision={precision}"),
            *(f"engine.activation_checkpointing.backend={checkpointing}", f"model.attention.backend={backend}"),
        ],
    ).config
    check(config, "cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("shape", CLASSES)
def test_a_class_head_and_its_loss_take_as_much_as_planned(shape, precision):
    fields = ("data.global_batch_size=64", "model.depths=[2,2]", *CLASSES[shape], f"engine.precision={precision}")
    fields += ("model.attention.backend=eager",)
    check(load_config(CONFIGS / "quickstart" / "finetune.yaml", [*COLOUR, *fields]).config, "cpu")


@pytest.mark.parametrize("backend", ["eager", "sequential"])
def test_fairscales_checkpoints_take_as_much(backend):
    fields = (*SHAPES["two stages"], "engine.precision=bf16", f"model.attention.backend={backend}")
    checkpointing = "engine.activation_checkpointing.backend=fairscale"
    check(load_config(CONFIGS / "quickstart" / "simmim.yaml", [*COLOUR, *fields, checkpointing]).config, "cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_is_what_autograd_saves(precision, backend):
    # The count of saved tensors has neither the bytes of the images nor the loss; they are a few thousand bytes here.
    config = load_config(
        CONFIGS / "quickstart" / "simmim.yaml",
        [*COLOUR, *SHAPES["two stages"], f"engine.precision={precision}", f"model.attention.backend={backend}"],
    ).config
    model = SimMIMTask(config).build_model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    images, hidden = torch.zeros(4, 3, 64, 64, dtype=torch.uint8), torch.zeros(4, 8, 8, dtype=torch.bool)
    saved = saved_bytes(lambda: model(images, hidden, torch.arange(4)), model.parameters())
    assert kept_by_block(config)[-1] == pytest.approx(saved, rel=KEPT)


@pytest.mark.parametrize(
    ("file", "overrides"),
    [
        (GIANT, ()),
        (GIANT, ("engine.activation_checkpointing.backend=none", "model.attention.backend=eager")),
        (GIANT, ("model.image_size=640", "model.window_size=40", "data.micro_batch_size=1")),
        (BASE, ("engine.activation_checkpointing.backend=none", "model.attention.backend=sdpa")),
    ],
    ids=str,
)
def test_at_full_width_too_on_the_meta_device(file, overrides):
    # Fewer of the 42 blocks of the third stage, which are all alike.
    check(
        load_config(CONFIGS / file, ["model.depths=[2,2,6,2]", "model.extra_norm_every=6", *overrides]).config, "meta"
    )


def test_giant_at_1536_px_needs_sequential_attention_in_every_stage():
    # Far more than 40 GB cards have, beside its states, else: the paper's section 3.5.
    fields = ("model.image_size=1536", "model.window_size=32", "data.micro_batch_size=1")
    peaks = {
        backend: activations(load_config(CONFIGS / GIANT, [*fields, f"model.attention.backend={backend}"]).config).peak
        for backend in ("eager", "sequential")
    }
    assert peaks["sequential"] < 8 * 2**30 < 20 * 2**30 < peaks["eager"]


@pytest.mark.parametrize("backend", ["torch", "fairscale"])
def test_offloaded_block_inputs_are_on_the_host(backend):
    checkpointing = "engine.activation_checkpointing"
    plain = load_config(CONFIGS / GIANT, [f"{checkpointing}.backend={backend}"]).config
    offloaded = load_config(CONFIGS / GIANT, [f"{checkpointing}.backend={backend}", f"{checkpointing}.offload=true"])
    on_device, on_host = activations(plain), activations(offloaded.config)
    assert on_host.host == on_device.kept - on_host.kept > 0 == on_device.host
