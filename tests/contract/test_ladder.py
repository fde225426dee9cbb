"""The stages of configs/stages against what is published: written down here once more, from the sources, by hand.

Sources: Swin V2 (arXiv 2111.09883), appendices A1, A2.1 and A2.2; microsoft/Swin-Transformer at f82860b, configs/simmim
and configs/swinv2, whose rates are for a batch of 512. What is neither's is ours, and is written down all the same: it
can only be changed in two places.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from swinv2_scale.config.loader import flatten, load_config
from swinv2_scale.config.model import VARIANTS
from swinv2_scale.config.recipe import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = ("simmim_192w12", "supervised_192w12", "supervised_256w16", "supervised_384w24", "supervised_640w40")
STAGES = (*STAGES, "supervised_1536w32")
SMALL, LARGE = ("tiny", "small"), ("base", "large", "huge", "1b")

#: Images of ImageNet-1K, ImageNet-22K, and the paper's ImageNet-22K-ext.
IN1K, IN22K, EXTENDED = 1_281_167, 14_197_122, 70_000_000


def schedule(epochs: float, warmup: float, images: int, batch: int, base_lr: float, *, at: int | None = 512) -> Any:
    """Steps of so many epochs, and a rate that grows with the batch; ``at=None``: it is for this very batch."""
    steps = {"total_steps": round(epochs * images / batch), "warmup_steps": round(warmup * images / batch)}
    return {**steps, "lr": base_lr * batch / at if at else base_lr, "batch": batch}


AUGMENTED = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "remode": "pixel", "recount": 1, "smoothing": 0.1}
MIXED = {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5}
CENTRE = {"crop_pct": 0.875, "crop_mode": "center"}
SQUASHED = {"crop_pct": 1.0, "crop_mode": "squash"}
PLAIN = {"schedule": "cosine", "clip_grad_norm": 5.0, "num_classes": 1000, "layer_decay": 1.0}
SIMMIM = schedule(800, 10, IN1K, 2048, 1e-4)
SIMMIM |= {"drop_path_rate": 0.1, "weight_decay": 0.05, "clip_grad_norm": 5.0, "layer_decay": 1.0, "warmup_lr": 2e-6}
SIMMIM |= {"schedule": "multistep", "gamma": 0.1, "milestones": (round(700 * IN1K / 2048),)}
SIMMIM |= {"target_norm_window": 47, "mask_ratio": 0.6, "mask_patch_size": 32}
SIMMIM |= {"crop_scale": (0.67, 1.0), "crop_ratio": (3 / 4, 4 / 3)}
#: simmim_finetune__swinv2_base__img224_window14__800ep.yaml
AFTER_SIMMIM = {**PLAIN, **AUGMENTED, **MIXED, **CENTRE, **schedule(100, 20, IN1K, 2048, 1.25e-3)}
AFTER_SIMMIM |= {"drop_path_rate": 0.1, "weight_decay": 0.05, "layer_decay": 0.75, "min_lr": 1e-6, "warmup_lr": 1e-6}
#: A2.1, swinv2_{base,large}_patch4_window12_192_22k.yaml; the layer decay is AFTER_SIMMIM's (ours)
ON_22K = {**PLAIN, **AUGMENTED, **MIXED, **CENTRE, **schedule(90, 5, IN22K, 4096, 1.25e-4)}
ON_22K |= {"drop_path_rate": 0.2, "weight_decay": 0.1, "layer_decay": 0.75, "min_lr": 1e-5, "warmup_lr": 1e-6}
ON_22K |= {"num_classes": 21841}
#: A1, A2.1, swinv2_{base,large}_patch4_window12to16_192to256_22kto1k_ft.yaml
FINE_TUNED = {**PLAIN, **AUGMENTED, **MIXED, **CENTRE, **schedule(30, 5, IN1K, 1024, 2e-5)}
FINE_TUNED |= {"drop_path_rate": 0.2, "weight_decay": 1e-8, "min_lr": 4e-7, "warmup_lr": 4e-8}
#: Ours: as long as G's.
LARGER = {**FINE_TUNED, **SQUASHED, **schedule(10, 2, IN1K, 1024, 2e-5)}

#: A2.2
G = {"clip_grad_norm": 100.0, "weight_decay": 0.1, "schedule": "cosine", "warmup_lr": 0.0, "min_lr": 0.0}
G_SUPERVISED = {**G, **AUGMENTED, "mixup": 0.0, "cutmix": 0.0}
G_FINE_TUNED = {**G_SUPERVISED, **SQUASHED, "drop_path_rate": 0.5, "num_classes": 1000, "layer_decay": 1.0}
G_FINE_TUNED |= schedule(10, 2, IN1K, 576, 2.1e-5, at=None)
G_SIMMIM = {name: SIMMIM[name] for name in ("crop_scale", "crop_ratio", "mask_ratio", "target_norm_window")}
G_SIMMIM |= {**G, **schedule(20, 0, EXTENDED, 9216, 1.4e-3, at=None), "warmup_steps": 30_000, "drop_path_rate": 0.0}
G_SIMMIM |= {"total_steps": 151_900}  # to the hundred, as "70 million" is
G_22K = {**G_SUPERVISED, **CENTRE, **schedule(30, 0, EXTENDED, 9216, 1.4e-3, at=None), "warmup_steps": 20_000}
G_22K |= {"drop_path_rate": 0.3, "layer_decay": 0.87, "num_classes": 21841}
GIANT = {
    "simmim_192w12": G_SIMMIM,
    "supervised_192w12": G_22K,
    "supervised_256w16": {**G_FINE_TUNED, **CENTRE},
    "supervised_384w24": G_FINE_TUNED,
    "supervised_640w40": G_FINE_TUNED,
    "supervised_1536w32": G_FINE_TUNED,
}


def published(variant: str, stage: str) -> dict[str, Any]:
    if variant == "giant":
        return GIANT[stage]
    if stage == "simmim_192w12":
        return SIMMIM
    if stage == "supervised_192w12":
        return AFTER_SIMMIM if variant in SMALL else ON_22K
    found = {"supervised_256w16": FINE_TUNED, "supervised_384w24": {**FINE_TUNED, **SQUASHED}}.get(stage, LARGER)
    return found | ({"drop_path_rate": 0.1} if variant in SMALL else {})


def path_of(variant: str, stage: str) -> Path:
    return CONFIGS / "stages" / variant / f"{stage}.yaml"


def test_every_variant_has_every_stage_and_there_are_no_others() -> None:
    found = {path.relative_to(CONFIGS / "stages") for path in (CONFIGS / "stages").rglob("*.yaml")}
    wanted = {path_of(variant, stage).relative_to(CONFIGS / "stages") for variant in VARIANTS for stage in STAGES}
    assert {path for path in found if path.parent.name != "shared"} == wanted


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stage_has_the_numbers_that_are_published(variant: str, stage: str) -> None:
    config = load_config(path_of(variant, stage)).config
    sections = (config.model, config.data, config.task, config.optim)
    values = {key[-1]: value for section in sections for key, value in flatten(section).items()}
    values["batch"] = config.data.global_batch_size
    wanted = published(variant, stage)
    # Rates are products of decimal fractions.
    assert {name: values[name] for name in wanted} == {
        name: pytest.approx(value, rel=1e-12) if isinstance(value, float) else value for name, value in wanted.items()
    }
    task, size, window = re.fullmatch(r"(simmim|supervised)_(\d+)w(\d+)", stage).groups()  # type: ignore[union-attr]
    assert (config.model.variant, config.model.image_size, config.model.window_size) == (
        variant,
        int(size),
        int(window),
    )
    assert config.task.name == {"simmim": "simmim", "supervised": "classification"}[task]
    assert config.optim.ema_decay is None  # nobody has published one
    assert config.model.pretrained_window_sizes is None  # inherited
    assert (config.optim.betas, config.optim.eps) == ((0.9, 0.999), 1e-8)


def test_the_first_windows_of_every_ladder_are_those_of_the_released_models() -> None:
    for variant in VARIANTS:
        model = load_config(path_of(variant, "simmim_192w12")).config.model
        assert model.settled.pretrained_window_sizes == (12, 12, 12, 6)


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "stages").rglob("*.yaml")), ids=lambda path: "/".join(path.parts[-2:])
)
def test_every_number_of_a_stage_says_where_it_is_from(path: Path) -> None:
    unmarked = []
    for line in path.read_text().splitlines():
        setting, _, comment = line.partition("  # ")
        value = yaml.safe_load(setting.partition(":")[2]) if ":" in setting and not setting.startswith("#") else None
        numbers = value if isinstance(value, list) else [value]
        # YAML 1.1, which this reads, takes 4.0e-4 for a text.
        is_number = any(isinstance(n, int | float) or re.match(r"\d", str(n)) for n in numbers)
        if is_number and not re.match(r"paper (A|sec)|released|\(ours\) |ImageNet", comment):
            unmarked.append(line)
    assert unmarked == []


@pytest.mark.parametrize("path", sorted((CONFIGS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_stages_of_a_shipped_recipe_fit_together(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "map22kto1k.txt").write_text("\n".join(map(str, range(0, 21_000, 21))))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert [stage.predecessor for stage in recipe.stages] == [None, *recipe.stages[:-1]]
    if path.stem in VARIANTS:
        assert [stage.config_path.resolve() for stage in recipe.stages] == [path_of(path.stem, s) for s in STAGES]


def test_every_variant_has_a_recipe() -> None:
    assert set(VARIANTS) < {path.stem for path in (CONFIGS / "recipes").glob("*.yaml")}
