"""The GPUs and networks that a plan is made for: what their makers state, not what was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

from swinv2_scale.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        memory_bytes: of the device.
        tflops_16bit: dense bfloat16, 10**12 floating-point operations a second.
        tflops_32bit: float32 without TF32, as torch computes it by default.
        link_gb_s: to other GPUs of the node, 10**9 bytes a second, each way.
    """

    name: str
    memory_bytes: int
    tflops_16bit: float
    tflops_32bit: float
    link_gb_s: float


#: NVIDIA's data sheets (A100 80GB: 2021; H100 SXM: 2022; H200: 2024). NVLink's figure there is both ways together.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", 40 * 2**30, 312, 19.5, 300),
        Device("a100-80", 80 * 2**30, 312, 19.5, 300),
        Device("h100", 80 * 2**30, 989, 67, 450),
        Device("h200", 141 * 10**9, 989, 67, 450),
    )
}


@dataclass(frozen=True)
class Cluster:
    """What a run is planned for.

    Attributes:
        gpus: of all nodes together.
        network_gbit_s: of one node, 10**9 bits a second, each way.
        efficiency: share of the device's peak rate that the arithmetic reaches while it goes on.
    """

    device: Device
    gpus: int
    nodes: int
    network_gbit_s: float = 1600
    efficiency: float = 0.4

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: GPUs that can't be dealt to nodes evenly.
        """
        if self.gpus % self.nodes:
            lower, upper = self.gpus // self.nodes * self.nodes, -(-self.gpus // self.nodes) * self.nodes
            fits = f"{upper}" if not lower else f"{lower} and {upper}"
            raise ConfigError(
                f"{self.gpus} GPUs are not as many on each of {self.nodes} nodes", f"{fits} GPUs are, or other --nodes"
            )

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.nodes


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """``40GiB``, ``141 GB``, ``80e9`` -> bytes.

    Raises:
        ConfigError: it isn't a size.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    try:
        size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{text!r} is no size of memory", "say 40GiB, or 141GB")
    return size
