"""Compile the kernels of the ``triton`` backend for an H100 or H200, which needs no GPU, and read what came of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swinv2_scale.models.ops import triton_kernels
from swinv2_scale.models.ops.triton_launches import Launch, block_length

#: What a pointer points to; the other arguments that are no constants are int32.
OF_QKVS_TYPE = {"qkv", "out", "dout", "dqkv"}
INTEGERS = {"order": "*i64", "code": "*i32"}
FLOATS = {"rq", "rk", "scale", "table", "lse", "delta", "dtable", "blocks", "shares"}


@dataclass(frozen=True)
class Compiled:
    """Of one kernel: what a thread and a program take, and its instructions by name."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: dict[str, int]


def compile_kernel(name: str, launch: Launch, head_dim: int, dtype: str, full: bool) -> Compiled:
    """``dtype`` is bf16, fp16 or fp32."""
    kernel = getattr(triton_kernels, name)
    constants: dict[str, Any] = {"dim": head_dim, "width": block_length(head_dim)}
    constants |= {"block_m": launch.block_m, "block_n": launch.block_n}
    constants |= {"full": full, "block": 64, "block_x": 16, "block_c": 64}
    signature, values, attributes = {}, {}, {}
    for number, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(number,)] = "constexpr", constants[argument]
        elif argument in OF_QKVS_TYPE:
            signature[argument] = f"*{dtype}"
        else:
            signature[argument] = INTEGERS.get(argument, "*fp32" if argument in FLOATS else "i32")
        if signature[argument][0] == "*":
            attributes[(number,)] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(cubin: bytes, shared_bytes: int) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(str(tools / "cuobjdump"), "-res-usage", str(path))
        assembly = _output(str(tools / "nvdisasm"), "-c", str(path))
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", assembly, re.MULTILINE)
    found = {field: int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK")}  # type: ignore[index]
    return Compiled(found["REG"], found["STACK"], shared_bytes, {name: names.count(name) for name in set(names)})


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
