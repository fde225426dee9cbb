"""ModelConfig, and the one table of variants."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from swinv2_scale import geometry

AttentionBackend = Literal["auto", "eager", "sequential", "sdpa", "fused", "triton"]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
#: One entry a stage: a number, or (height, width); 0 is "its own".
PretrainedWindows = tuple[Annotated[int, Field(ge=0)] | tuple[PositiveInt, PositiveInt], ...]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every part of the configuration: unknown keys are errors, types are exact, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


#: Every named shape. Widths and depths: Swin V2 (arXiv 2111.09883) sec. 3.6 and the released configurations of T to L.
#: The heads of H and G were never published; 32 channels a head is what all published variants have. The extra
#: LayerNorm "on the main branch every 6 layers" (sec. 3.6) belongs to H and G alone. ``1b`` is what Microsoft's model
#: hub calls "giant" or "g" and gives as 1.06 billion parameters: not the paper's G. Its width is not published; 448 is
#: the multiple of 32 that gives that number.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
    "huge": {"embed_dim": 352, "depths": (2, 2, 18, 2), "num_heads": (11, 22, 44, 88), "extra_norm_every": 6},
    "1b": {"embed_dim": 448, "depths": (2, 2, 18, 2), "num_heads": (14, 28, 56, 112)},
    "giant": {"embed_dim": 512, "depths": (2, 2, 42, 4), "num_heads": (16, 32, 64, 128), "extra_norm_every": 6},
}


#: Fields of ModelConfig that say how it is computed, not what: no weights depend on them.
EXECUTION_FIELDS = {"attention", "linear", "compile"}


class AttentionConfig(Section):
    """How window attention is computed; the numbers are the same for every choice, memory and time are not."""

    #: One name for all stages, or one for each. ``fused`` is for CPUs, and built by ``swinv2-scale kernels build``;
    #: ``auto`` takes it where it is there, and says so. ``triton`` is for GPUs, and experimental.
    backend: AttentionBackend | tuple[AttentionBackend, ...] = "auto"
    #: ``sequential`` splits its work until scores and expanded bias of one piece fit in this many bytes.
    max_score_bytes: PositiveInt = 256 * 2**20


class ModelConfig(Section):
    """A Swin V2 backbone. ``variant`` fills in what isn't given; every field can be given."""

    variant: str = "tiny"
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 192
    in_channels: PositiveInt = 3
    patch_size: PositiveInt = 4
    embed_dim: PositiveInt
    depths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    num_heads: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    window_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 12
    #: The window each stage was first pre-trained with, one number or (height, width); 0 or nothing: this run is the
    #: first, its own window counts. Weights that are loaded bring theirs with them.
    pretrained_window_sizes: PretrainedWindows | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    drop_path_rate: Fraction = 0.0
    #: A LayerNorm on the main branch after every so many blocks; 0: none.
    extra_norm_every: Annotated[int, Field(ge=0)] = 0
    #: Whether those blocks are counted in each stage or through the model. The paper doesn't say; three public codes
    #: count in each stage, which for G puts 7 norms into its third stage and none elsewhere.
    extra_norm_counter: Literal["stage", "model"] = "stage"
    num_classes: Annotated[int, Field(ge=0)] = 0
    attention: AttentionConfig = AttentionConfig()
    #: What multiplies float32 in Linears on a CPU: ``torch`` (MKL), ``onednn``, or ``auto``: oneDNN where MKL is slow,
    #: on x86 CPUs that aren't Intel's. GPUs and other types know no difference.
    linear: Literal["auto", "torch", "onednn"] = "auto"
    #: torch.compile of the blocks: faster steps, after a first one that takes minutes. Needs a C++ compiler.
    compile: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        variant = data.get("variant", "tiny")
        # An unknown name is reported by the loader, with the known ones; the shape keys then are no problem of theirs.
        return {**VARIANTS.get(variant if isinstance(variant, str) else "", VARIANTS["tiny"]), **data}

    @property
    def image_shape(self) -> geometry.Size:
        return geometry.as_size(self.image_size, 2)

    @property
    def window_shape(self) -> geometry.Size:
        return geometry.as_size(self.window_size, 2)

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def stride(self) -> int:
        """Pixels of one token of the last stage, along each axis."""
        return self.patch_size << (self.num_stages - 1)

    @property
    def stage_dims(self) -> tuple[int, ...]:
        return tuple(self.embed_dim * 2**stage for stage in range(self.num_stages))

    @property
    def stage_maps(self) -> tuple[geometry.Size, ...]:
        return geometry.stage_maps(self.image_shape, self.patch_size, self.num_stages)

    @property
    def stage_windows(self) -> tuple[geometry.Size, ...]:
        """The window really used in each stage at ``image_size``."""
        return tuple(geometry.effective_window(self.window_shape, map_size) for map_size in self.stage_maps)

    @property
    def stage_pretrained_windows(self) -> tuple[geometry.Size, ...]:
        """The window that each stage's position bias was or is first trained with, along each axis.

        Fixed by the configuration, not by the images that come: a trained model keeps its scale at any size.
        """
        given = self.pretrained_window_sizes or (0,) * self.num_stages
        return tuple(
            geometry.as_size(size, 2) if size else used for size, used in zip(given, self.stage_windows, strict=True)
        )

    @property
    def settled(self) -> ModelConfig:
        """The same model with its pretrained windows spelled out: what is saved with weights, and inherited."""
        sizes = tuple(size[0] if len(set(size)) == 1 else size for size in self.stage_pretrained_windows)
        return self.model_copy(update={"pretrained_window_sizes": sizes})

    def has_extra_norm(self, stage: int, block: int) -> bool:
        """Whether a LayerNorm stands on the main branch after a block of a stage."""
        number = block + 1 + (sum(self.depths[:stage]) if self.extra_norm_counter == "model" else 0)
        return self.extra_norm_every > 0 and number % self.extra_norm_every == 0

    @property
    def stage_backends(self) -> tuple[AttentionBackend, ...]:
        backend = self.attention.backend
        return backend if isinstance(backend, tuple) else (backend,) * self.num_stages

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Drop rate of every block in order, rising linearly from 0 (as timm's and Microsoft's ``linspace``)."""
        last = max(sum(self.depths) - 1, 1)
        return tuple(self.drop_path_rate * block / last for block in range(sum(self.depths)))
