"""What each kernel takes of a GPU: registers, spilled bytes, shared memory. Compiles; needs no GPU.

python benchmarks/cubins.py
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fettle.ops.kernels import (
    attention,
    cache,
    gated_activation,
    matvec,
    nf4,
    paged_attention,
    rms_norm,
    rotary,
)

TARGETS = {75: "fp16", 80: "bf16", 90: "bf16"}
SHARED_LIMIT = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

FLOATS = "scale eps nested_offset".split()
FP32_POINTERS = "rstd partials table absmax code_book nested_absmax logsumexp delta".split()
INT_POINTERS = "starts roots prefix_ends ends bounds lengths slots page_table words".split()
HALF_POINTERS = """x weight output grad grad_x gate up grad_gate grad_up product cos sin query key value out
    grad_query grad_key grad_value keys values rotated residual total norm""".split()
POINTERS = dict.fromkeys(FP32_POINTERS, "*fp32") | dict.fromkeys(INT_POINTERS, "*i32") | {"packed": "*u8"}


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel with the constants that it is launched with, at a common size."""

    kernel: Any
    size: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    may_spill: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """registers a thread; spilled: bytes of a thread's local memory; shared: bytes a block."""

    registers: int
    spilled: int
    shared: int


def cases(capability: int) -> Iterator[Case]:
    """Every kernel of fettle.ops.kernels."""
    for hidden in (128, 3072, 8192):
        layout = rms_norm.layout(hidden)
        warps = layout.pop("num_warps")
        yield Case(rms_norm.rms_norm_forward_kernel, f"{hidden}", {"OFFSET": False, **layout}, warps)
        for needed in (False, True):
            constants = {"OFFSET": False, "NEEDS_WEIGHT_GRAD": needed, **layout}
            size = f"{hidden} with weight" if needed else f"{hidden}"
            yield Case(rms_norm.rms_norm_backward_kernel, size, constants, warps)
    for inverse in (False, True):
        constants = {"IS_INVERSE": inverse, "HEADS": rotary.HEADS, "BLOCK": 64}
        yield Case(rotary.rotary_kernel, "inverse" if inverse else "96", constants)
    for is_silu in (True, False):
        constants = {"IS_SILU": is_silu, "BLOCK": gated_activation.BLOCK}
        for kernel in (
            gated_activation.gated_activation_forward_kernel,
            gated_activation.gated_activation_backward_kernel,
        ):
            yield Case(kernel, "silu" if is_silu else "gelu", constants)
    sizes = {"BLOCK": nf4.BLOCK, "NESTED_BLOCK": nf4.NESTED_BLOCK, "BLOCKS": nf4.BLOCKS}
    for nested in (False, True):
        yield Case(nf4.nf4_dequantize_kernel, "nested" if nested else "plain", {"IS_NESTED": nested, **sizes})
    common = {"SHUFFLES": True, "NESTED": nf4.NESTED_BLOCK}
    around = {"HAS_NORM": True, "OFFSET": False, "GATE": 0, "HAS_RESIDUAL": False}
    for size, changed in (("norm", {}), ("norm, gate", {"GATE": 1})):
        layout = matvec.matvec_layout(8192, "GATE" in changed, 4096)
        warps = layout.pop("num_warps")
        yield Case(matvec.matvec_kernel, size, around | changed | layout, warps)
        layout = matvec.nf4_matvec_layout(8192, "GATE" in changed, 4096)
        warps = layout.pop("num_warps")
        constants = common | {"IS_NESTED": True, "IS_EVEN": True} | around | changed | layout
        yield Case(matvec.nf4_matvec_kernel, size, constants, warps)
    for nested in (False, True):
        layout = matvec.nf4_few_rows_layout()
        warps = layout.pop("num_warps")
        constants = common | {"IS_NESTED": nested, "ROWS": matvec.MOST_ROWS, **layout}
        size = "nested" if nested else "plain"
        yield Case(matvec.nf4_few_rows_kernel, size, constants, warps, may_spill=capability < 80)
    yield from _attention(capability)
    yield from _paged_attention(capability)


def _attention(capability: int) -> Iterator[Case]:
    channels = 96
    block = attention.block_size(channels, 2, capability)
    constants = {"GROUP": 2, "D": channels, "PADDED": 128, "SOFTCAP": 0.0, "QUERIES": block, "KEYS": block}
    for kernel in (
        attention.forward_kernel,
        attention.query_gradient_kernel,
        attention.key_value_gradient_kernel,
    ):
        yield Case(kernel, f"{channels}", constants, stages=1, may_spill=True)


def _paged_attention(capability: int) -> Iterator[Case]:
    for group, channels in ((1, 96), (2, 256), (4, 128), (4, 64)):
        common = {"D": channels, "PADDED": triton.next_power_of_2(channels), "HEADS": cache.HEADS}
        size = f"{group} x {channels}"
        yield Case(cache.write_cache_kernel, size, common)
        constants = common | {"ROTARY": channels, "HALF": common["PADDED"] // 2, "REST": 1}
        yield Case(cache.rotate_and_cache_kernel, size, constants)
        del common["HEADS"]
        read = common | {"GROUP": group, "PAGE": 16, "SOFTCAP": 50.0 if channels == 256 else 0.0}
        layout = paged_attention.decode_layout(group, channels, 2, capability)
        warps, stages = layout.pop("num_warps"), layout.pop("num_stages")
        for turned in (0, channels):
            constants = read | layout | {"IS_WHOLE": False, "ROTARY": turned}
            name = f"{size}, rotary" if turned else size
            yield Case(
                paged_attention.decode_kernel, name, constants, warps, stages, may_spill=capability < 80
            )
        constants = common | {"PARTS": 64, "KEYS": 32}
        yield Case(paged_attention.merge_kernel, size, constants, 16)
        layout = paged_attention.prefill_layout(group, channels, 2, capability)
        warps, stages = layout.pop("num_warps"), layout.pop("num_stages")
        constants = read | layout | {"SEQUENCES": 256}
        yield Case(paged_attention.prefill_kernel, size, constants, warps, stages, may_spill=capability < 80)


def usage(case: Case, capability: int) -> Usage:
    """Compile the kernel for a GPU of this compute capability and read what it takes."""
    kinds = POINTERS | dict.fromkeys(HALF_POINTERS, f"*{TARGETS[capability]}") | dict.fromkeys(FLOATS, "fp32")
    if case.constants.get("IS_NESTED"):
        kinds["absmax"] = "*u8"
    signature = {
        name: "constexpr" if name in case.constants else kinds.get(name, "i32")
        for name in case.kernel.arg_names
    }
    # As at a launch: memory begins at multiples of 16 bytes, and so do rows.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in ("rows", "heads", "x_channel"))
    }
    built = triton.compile(
        ASTSource(case.kernel, signature, case.constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    return _read(built.asm["cubin"], built.metadata.shared)


def _read(cubin: bytes, shared: int) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], shared)


def main() -> None:
    """Print the table."""
    print(f"{'kernel':36}{'size':18}{'target':>8}{'registers':>11}{'spilled':>9}{'shared':>9}")
    for capability in TARGETS:
        for case in cases(capability):
            found = usage(case, capability)
            print(f"{case.kernel.__name__:36}{case.size:18}{f'sm_{capability}':>8}", end="")
            print(f"{found.registers:11}{found.spilled:9}{found.shared:9}")


if __name__ == "__main__":
    main()
