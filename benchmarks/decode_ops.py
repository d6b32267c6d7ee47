"""The kernels of generation on one GPU: checked against their references, then timed against PyTorch's own.

    python benchmarks/decode_ops.py [--only check,matvec,nf4,decode,prefill,small] [--tune]

Times are of CUDA graphs, microseconds per call, with inputs that together exceed the GPU's cache. GB/s counts what an
op must read once. --tune tries other sizes of the products' programs. No time is printed unless the checks pass.
"""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from fettle.ops.gated_activation import gated_activation_forward
from fettle.ops.kernels import matvec as matvec_kernels
from fettle.ops.matvec import Norm, matvec, matvec_reference
from fettle.ops.nf4 import Nf4, nf4_dequantize, nf4_quantize
from fettle.ops.paged_attention import (
    decode_attention,
    decode_attention_reference,
    prefill_attention,
    prefill_attention_reference,
    rotate_and_cache,
    rotate_and_decode,
    write_cache,
)
from fettle.ops.rms_norm import rms_norm
from fettle.ops.rotary import apply_rotary, apply_rotary_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
PAGE = 16
CACHE_BYTES = 200e6  # of inputs in turn: several times the 50 MB of an H200's cache
TOLERANCE = 1e-2
"""Of |found - expected| / |expected|, in bf16: rounding of the result alone is 2e-3, of the weights 3e-3."""

# query heads, key heads, channels, rules, weights as (outputs, inputs)
MODELS: dict[str, tuple[int, int, int, dict[str, Any], list[tuple[int, int]]]] = {
    "phi-3.5": (32, 32, 96, {}, [(9216, 3072), (3072, 3072), (16384, 3072), (3072, 8192), (32064, 3072)]),
    "llama-8b": (32, 8, 128, {}, [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]),
    "gemma-9b": (16, 8, 256, {"softcap": 50.0}, [(8192, 3584), (3584, 4096), (28672, 3584), (3584, 14336)]),
}
BATCHES, LENGTHS = (1, 8, 64), (256, 2048, 16384)

begun = time.perf_counter()


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", default="check,matvec,nf4,decode,prefill,small")
    options.add_argument("--tune", action="store_true")
    found = options.parse_args()
    torch.manual_seed(0)
    parts = {
        "check": check, "matvec": time_matvec, "nf4": time_nf4, "decode": time_decode,
        "prefill": time_prefill, "small": time_small,
    }  # fmt: skip
    for name in found.only.split(","):
        parts[name]()
        print(f"-- {name}: {time.perf_counter() - begun:.0f} s since the start", flush=True)
    if found.tune:
        tune()


# --- correctness -------------------------------------------------------------------------------------------

wrong: list[str] = []


def agree(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare by norm; NaN anywhere is a failure."""
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    print(f"  {name:58} {error:.1e}" + ("" if error <= tolerance else "  WRONG"))
    if not error <= tolerance:
        wrong.append(name)


def check() -> None:
    for name, run in (("paged", check_paged), ("captured", check_captured), ("products", check_products)):
        try:
            run()
        except Exception as error:  # the other checks still tell something
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            print(f"  {wrong[-1]}")
    check_small()
    if wrong:
        sys.exit(f"wrong: {'; '.join(wrong)}")


def cache_of(lengths: list[int], heads: int, channels: int) -> tuple[torch.Tensor, ...]:
    """Keys, values, page table and lengths; every slot that no sequence uses holds NaN."""
    needed = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(needed) + 1)
    cache = torch.full((2, len(order), PAGE, heads, channels), torch.nan, dtype=DTYPE, device=DEVICE)
    table = order[-1].repeat(len(lengths), max(needed) + 3).int()
    for sequence, (count, length) in enumerate(zip(needed, lengths, strict=True)):
        own, order = order[:count], order[count:]
        table[sequence, :count] = own
        slots = (own[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length].to(DEVICE)
        cache.flatten(1, 2)[:, slots] = torch.randn(2, length, heads, channels, device=DEVICE).to(DTYPE)
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return cache[0], cache[1], table.to(DEVICE), counts


def check_paged() -> None:
    cases: list[tuple[int, int, int, dict[str, Any]]] = [
        (3, 3, 96, {}),
        (4, 4, 64, {"window": 100}),
        (4, 2, 256, {"softcap": 5.0, "window": 300}),
        (8, 2, 128, {}),
        (7, 1, 64, {"softcap": 5.0}),
        (6, 2, 96, {"window": 33}),
        (16, 1, 128, {"window": 333}),
    ]
    for heads, shared, channels, rules in cases:
        keys, values, table, lengths = cache_of([1, 0, 17, 1000, 2049], shared, channels)
        wide = (keys.double(), values.double(), table)
        query = torch.randn(5, heads + 1, channels, device=DEVICE).to(DTYPE)[:, 1:]
        expected = decode_attention_reference(query.double(), *wide, lengths, scale=0.1, **rules)
        for splits in (None, 1, 7):
            found = decode_attention(query, keys, values, table, lengths, scale=0.1, splits=splits, **rules)
            agree(f"decode {heads}/{shared} x {channels} {rules} splits {splits}", found, expected)
        check_fused(heads, keys, values, table, lengths, rules)
        new = [1, 0, 17, 333, 130]
        bounds = torch.tensor([0, *new], device=DEVICE).cumsum(0).int()
        query = torch.randn(sum(new) + 3, heads, channels, device=DEVICE).to(DTYPE)
        expected = prefill_attention_reference(query.double(), *wide, bounds, lengths, scale=0.1, **rules)
        found = prefill_attention(query, keys, values, table, bounds, lengths, scale=0.1, **rules)
        agree(f"prefill {heads}/{shared} x {channels} {rules}", found, expected)


def check_fused(
    heads: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    rules: dict[str, Any],
) -> None:
    """rotate_and_decode against its two halves; the newest token's slot holds NaN before."""
    shared, channels = keys.shape[2:]
    query, key, value = random(5, heads + 2 * shared, channels).split([heads, shared, shared], 1)
    cos, sin = random(2, 5, channels - channels // 4)  # partial
    place = (lengths - 1).clamp(min=0).long()
    slots = table.gather(1, place[:, None] // PAGE)[:, 0] * PAGE + place % PAGE
    slots = torch.where(lengths > 0, slots, -1)
    whole = keys.clone(), values.clone()
    for cache in whole:
        cache.flatten(0, 1)[slots[slots >= 0]] = torch.nan
    open_caches = [(keys.clone(), values.clone()) for _ in range(2)]
    turned = rotate_and_cache(query, key, value, cos, sin, *whole, slots)
    wide = (x.double() for x in (turned, *whole))
    expected = decode_attention_reference(*wide, table, lengths, scale=0.1, **rules)
    for splits, caches in zip((None, 7), open_caches, strict=True):
        found = rotate_and_decode(
            *(query, key, value, cos, sin, *caches, table, lengths),
            **{"scale": 0.1, "splits": splits, **rules},
        )
        agree(f"rotate_and_decode {heads}/{shared} x {channels} {rules} splits {splits}", found, expected)
        for mine, theirs in zip(caches, whole, strict=True):
            agree("  its cache", mine.nan_to_num(), theirs.nan_to_num())


def check_captured() -> None:
    """One captured decode step serves other lengths, tokens and pages."""
    if DEVICE.type == "cpu":
        return
    first, second = (cache_of(lengths, 8, 128) for lengths in ([900, 3, 0, 64], [17, 888, 65, 1]))
    keys, values = torch.zeros(
        2, max(len(first[0]), len(second[0])), PAGE, 8, 128, device=DEVICE, dtype=DTYPE
    )
    table, lengths = torch.zeros(4, 64, dtype=torch.int32, device=DEVICE), first[3].clone()
    query = torch.randn(4, 32, 128, device=DEVICE).to(DTYPE)
    decode_attention(query, keys, values, table, torch.ones_like(lengths), scale=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_attention(query, keys, values, table, lengths, scale=0.1)
    for other in (first, second):
        keys[: len(other[0])], values[: len(other[1])] = other[:2]
        table[:, : other[2].shape[1]] = other[2]
        lengths.copy_(other[3])
        query.normal_()
        graph.replay()
        expected = decode_attention_reference(
            query.double(), keys.double(), values.double(), table, lengths, scale=0.1
        )
        agree("decode in a CUDA graph", found, expected)


def check_products() -> None:
    for outputs, inputs in ((3, 64), (1000, 3072), (3072, 8192), (257, 64 * 33)):
        plain = torch.randn(outputs, inputs, device=DEVICE).to(DTYPE)
        packed = nf4_quantize(plain)
        for rows in (1, 2, 5, 16):
            x, residual = (torch.randn(rows, n, device=DEVICE).to(DTYPE) for n in (inputs, outputs))
            dense = nf4_dequantize(packed, torch.float64)
            expected = F.linear(x.double(), dense) + residual.double()
            agree(f"nf4 {rows} x ({outputs}, {inputs})", matvec(x, packed, residual=residual), expected)
            if rows == 1:
                expected = F.linear(x.double(), plain.double())
                agree(f"matvec ({outputs}, {inputs})", matvec(x, plain), expected)
                expected += residual
                agree(
                    f"matvec ({outputs}, {inputs}) with residual",
                    matvec(x, plain, residual=residual),
                    expected,
                )
    x, scale, plain = random(1, 3072), random(3072), random(1000, 3072)
    packed = nf4_quantize(plain)
    unnested = Nf4(packed.packed, torch.rand(1000 * 48, device=DEVICE), packed.shape, DTYPE)
    for name, weight in (("bf16", plain), ("nf4", packed), ("nf4 with plain scales", unnested)):
        dense = nf4_dequantize(weight, torch.float64) if isinstance(weight, Nf4) else weight.double()
        for activation_name, has_norm in itertools.product(
            (None, "silu", "gelu_pytorch_tanh"), (False, True)
        ):
            around = {"activation_name": activation_name}
            found = matvec(x, weight, norm=Norm(scale, 1e-5) if has_norm else None, **around)
            norm = Norm(scale.double(), 1e-5) if has_norm else None
            expected = matvec_reference(x.double(), dense, norm=norm, **around)
            agree(f"{name} {activation_name} {'with' if has_norm else 'without'} norm", found, expected)


def check_small() -> None:
    for rotary in (96, 64):
        fused = torch.randn(5, 3 * 4, 96, device=DEVICE).to(DTYPE)
        query, key, value = fused.chunk(3, 1)
        cos, sin = torch.randn(2, 5, rotary, device=DEVICE).to(DTYPE)
        keys, values = torch.zeros(2, 2, PAGE, 4, 96, device=DEVICE, dtype=DTYPE)
        slots = torch.tensor([17, -1, 3, 4, 31], device=DEVICE)
        found = rotate_and_cache(query, key, value, cos, sin, keys, values, slots)
        turned = [
            apply_rotary_reference(x.transpose(0, 1)[None], cos[None], sin[None])[0].transpose(0, 1)
            for x in (query, key)
        ]
        real = [0, 2, 3, 4]
        agree(f"rotate query, {rotary} of 96", found, turned[0])
        agree(f"rotate key, {rotary} of 96", keys.flatten(0, 1)[slots[real]], turned[1][real])
        agree("cache value", values.flatten(0, 1)[slots[real]], value[real], 0)
        keys.flatten(0, 1)[slots[real]] = 0
        if keys.any():
            wrong.append("rotate_and_cache wrote elsewhere")
        write_cache(key, value, keys, values, slots.int())
        agree("write_cache", keys.flatten(0, 1)[slots[real]], key[real], 0)


# --- time --------------------------------------------------------------------------------------------------


def microseconds(calls: list[Callable[[], object]], least: float = 0.01) -> float:
    """Microseconds per call of the calls in turn, captured in one CUDA graph and replayed for `least` seconds."""
    calls[0]()
    if DEVICE.type == "cpu":
        return 1.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    elapsed, replays = _replay(graph, 1), max(1, 16 // len(calls))
    replays = max(replays, int(least / max(elapsed, 1e-6)))
    return 1e6 * min(_replay(graph, replays) for _ in range(3)) / replays / len(calls)


def _replay(graph: Any, replays: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def copies(bytes_each: float) -> int:
    return max(2, min(64, int(CACHE_BYTES / bytes_each) + 1))


def line(name: str, bytes_read: float, ours: float, theirs: float) -> None:
    print(
        f"  {name:34} {ours:9.1f} us {bytes_read / ours / 1e3:7.0f} GB/s"
        f"   torch {theirs:9.1f} us {bytes_read / theirs / 1e3:7.0f} GB/s {theirs / ours:6.2f}x",
        flush=True,
    )


def time_matvec() -> None:
    """One row in bf16, with a layer's sum for each model."""
    print("matvec, bf16, one row; torch: F.linear")
    for model, (*_, shapes) in MODELS.items():
        sums = [0.0, 0.0]
        for outputs, inputs in shapes:
            size = outputs * inputs * DTYPE.itemsize
            weights = [random(outputs, inputs) for _ in range(copies(size))]
            x = random(1, inputs)
            times = [
                microseconds([functools.partial(run, x, w) for w in weights]) for run in (matvec, F.linear)
            ]
            line(f"{model} ({outputs}, {inputs})", size, *times)
            sums = [a + b for a, b in zip(sums, times[:2], strict=True)] if outputs != 32064 else sums
        print(f"  {model}: one layer {sums[0]:.1f} us, torch {sums[1]:.1f} us")
    print("phi-3.5 with norm, activation and residual; torch: F.linear and separate launches")
    time_around(lambda plain: plain, DTYPE.itemsize)


def time_around(stored: Callable[[torch.Tensor], torch.Tensor | Nf4], bytes_each: float) -> None:
    """The products of one layer as an engine calls them."""
    sums, norm = [0.0, 0.0], Norm(random(3072), 1e-5)
    kinds = ((True, None), (False, None), (True, "silu"), (False, None))
    for (outputs, inputs), (has_norm, activation_name) in zip(MODELS["phi-3.5"][4][:4], kinds, strict=True):
        size = outputs * inputs * bytes_each
        weights = [stored(random(outputs, inputs)) for _ in range(copies(size))]
        x = random(1, inputs)
        around = {
            "norm": norm if has_norm else None,
            "activation_name": activation_name,
            "residual": None if has_norm else random(1, outputs),
        }
        times = [
            microseconds([functools.partial(run, x, w, **around) for w in weights]) for run in (matvec, apart)
        ]
        line(f"({outputs}, {inputs})", size, *times)
        sums = [a + b for a, b in zip(sums, times, strict=True)]
    print(f"  one layer {sums[0]:.1f} us, apart {sums[1]:.1f} us")


def apart(
    x: torch.Tensor,
    weight: torch.Tensor | Nf4,
    *,
    norm: Norm | None,
    activation_name: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return what `matvec` does, in several launches."""
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps, offset=norm.offset)
    y = matvec(x, weight) if isinstance(weight, Nf4) else F.linear(x, weight)
    if activation_name is not None:
        gate, up = y.chunk(2, 1)
        y = gated_activation_forward(gate, up, activation_name)
    return y if residual is None else y + residual


def time_nf4() -> None:
    print("nf4; torch: dequantize and F.linear")
    for model, (*_, shapes) in MODELS.items():
        total = 0.0
        for (outputs, inputs), rows in itertools.product(
            shapes[:4], (1, 4, 16) if model == "phi-3.5" else (1,)
        ):
            size = outputs * inputs * (0.5 + 1 / 64)
            first = nf4_quantize(random(outputs, inputs))
            weights = [
                Nf4(first.packed.clone(), first.absmax.clone(), first.shape, DTYPE, *nested_of(first))
                for _ in range(copies(size))
            ]
            x = random(rows, inputs)
            ours = microseconds([functools.partial(matvec, x, w) for w in weights])
            theirs = microseconds([lambda w=w: F.linear(x, nf4_dequantize(w, DTYPE)) for w in weights[:4]])  # noqa: B023
            line(f"{model} {rows:2} x ({outputs}, {inputs})", size, ours, theirs)
            total += ours if rows == 1 else 0
        print(f"  {model}: one layer, one row {total:.1f} us")
    print("phi-3.5 with norm, activation and residual; torch: the same kernel and separate launches")
    time_around(nf4_quantize, 0.5 + 1 / 64)


def nested_of(weight: Nf4) -> tuple[Any, ...]:
    return weight.nested_absmax, weight.nested_quant_map, weight.offset


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def time_decode() -> None:
    print("decode_attention; torch: SDPA on a contiguous cache, without a soft cap")
    for (model, (heads, shared, channels, rules, _)), batch, length in itertools.product(
        MODELS.items(), BATCHES, LENGTHS
    ):
        pages = -(-length // PAGE)
        size = 2 * batch * pages * PAGE * shared * channels * DTYPE.itemsize
        layers = copies(size)
        caches = [random(2, batch * pages, PAGE, shared, channels) for _ in range(layers)]
        table = torch.randperm(batch * pages, device=DEVICE).int().view(batch, pages)
        table = F.pad(table, (0, max(0, 1024 - pages)))  # as an engine has it: room for longer sequences
        lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
        query = random(batch, heads, channels)
        ours = microseconds(
            [
                functools.partial(decode_attention, query, *c, table, lengths, scale=0.1, **rules)
                for c in caches
            ]
        )
        dense = [
            c.view(2, batch, pages * PAGE, shared, channels).transpose(2, 3)[..., :length, :] for c in caches
        ]
        attend = functools.partial(F.scaled_dot_product_attention, scale=0.1, enable_gqa=heads != shared)
        theirs = microseconds([functools.partial(attend, query[:, :, None], *d) for d in dense])
        line(f"{model} {batch:2} x {length}", size, ours, theirs)
        del caches, dense

    print("rotate_and_decode; torch: rotate_and_cache and decode_attention")
    for model, (heads, shared, channels, rules, _) in MODELS.items():
        pages = 128
        caches = [random(2, pages, PAGE, shared, channels) for _ in range(16)]
        table, lengths = (torch.arange(n, device=DEVICE).int() for n in (pages, 1))
        lengths += 500
        query, key, value = random(1, heads + 2 * shared, channels).split([heads, shared, shared], 1)
        cos, sin = random(2, 1, channels)
        step = functools.partial(rotate_and_decode, query, key, value, cos, sin)
        ours = [functools.partial(step, *c, table[None], lengths, scale=0.1, **rules) for c in caches]

        def in_turn(keys: torch.Tensor, values: torch.Tensor) -> None:
            turned = rotate_and_cache(query, key, value, cos, sin, keys, values, lengths)  # noqa: B023
            decode_attention(turned, keys, values, table[None], lengths, scale=0.1, **rules)  # noqa: B023

        apart = [functools.partial(in_turn, *c) for c in caches]
        size = 2 * 500 * shared * channels * DTYPE.itemsize
        line(f"{model}  1 x 500", size, microseconds(ours), microseconds(apart))


def time_prefill() -> None:
    print(
        "prefill_attention, tokens behind a prefix; torch: FlashAttention-2 on contiguous keys, no soft cap"
    )
    for (model, (heads, shared, channels, rules, _)), (new, before) in itertools.product(
        MODELS.items(), ((512, 1536), (2048, 2048))
    ):
        length = new + before
        pages = length // PAGE
        keys, values = random(2, pages, PAGE, shared, channels)
        table = torch.randperm(pages, device=DEVICE).int()[None]
        bounds, counts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, new], [length]))
        query = random(new, heads, channels)
        run = functools.partial(
            prefill_attention, query, keys, values, table, bounds, counts, scale=0.1, **rules
        )
        ours = microseconds([run] * 4)
        theirs = float("nan")
        if DEVICE.type == "cuda":
            flash = functools.partial(
                torch.ops.aten._flash_attention_forward,
                *(query, keys.flatten(0, 1), values.flatten(0, 1), bounds, F.pad(counts, (1, 0))),
                *(new, length, 0.0, True, False),
                scale=0.1,
            )
            theirs = microseconds([flash] * 4)
        operations = 4 * heads * channels * new * (before + (new + 1) / 2)
        rates = [operations / t / 1e6 for t in (ours, theirs)]
        print(
            f"  {model:9} {new} behind {before}   {ours:8.1f} us {rates[0]:5.0f} TFLOP/s"
            f"   torch {theirs:8.1f} us {rates[1]:5.0f} TFLOP/s"
        )


def time_small() -> None:
    print("small ops at Phi-3.5's size; torch: the ops of training, one after the other")
    for tokens in (1, 64):
        fused = random(tokens, 3 * 32, 96)
        query, key, value = fused.split(32, 1)
        cos, sin = random(2, tokens, 96)
        keys, values = random(2, 8, PAGE, 32, 96)
        slots = torch.arange(tokens, device=DEVICE)
        rotated = (x.transpose(0, 1)[None] for x in (query, key))
        rows = [functools.partial(apply_rotary, x, cos[None], sin[None]) for x in rotated]

        def apart(rows: Iterable[Callable[[], object]] = rows) -> None:
            for row in rows:
                row()
            write_cache(key, value, keys, values, slots)  # noqa: B023

        one = functools.partial(rotate_and_cache, query, key, value, cos, sin, keys, values, slots)
        line(
            f"rotate_and_cache {tokens}",
            4 * fused.numel(),
            microseconds([one] * 20),
            microseconds([apart] * 20),
        )
        gate_up = random(tokens, 16384)
        one = functools.partial(gated_activation_forward, *gate_up.chunk(2, 1), "silu")
        two = functools.partial(lambda g, u: F.silu(g) * u, *gate_up.chunk(2, 1))
        line(
            f"gated_activation {tokens}",
            3 * gate_up.numel(),
            microseconds([one] * 20),
            microseconds([two] * 20),
        )


# --- sizes of programs -------------------------------------------------------------------------------------

PLAIN = [
    {"OUTPUTS": n, "INPUTS": k, "STAGES": stages, "num_warps": warps}
    for n, k, stages, warps in (
        *(
            (1, 1024, 1, 4),
            (2, 1024, 1, 4),
            (2, 1024, 3, 4),
            (4, 1024, 1, 4),
            (4, 1024, 3, 4),
            (4, 512, 4, 2),
        ),
        *((8, 512, 3, 4), (8, 1024, 2, 8), (1, 2048, 1, 4), (2, 512, 4, 2), (1, 1024, 3, 4), (2, 512, 1, 2)),
    )
]
PACKED = [
    {"OUTPUTS": n, "BLOCKS": k, "STAGES": stages, "num_warps": warps}
    for n, k, stages, warps in (
        *((4, 16, 1, 1), (4, 16, 3, 1), (2, 16, 3, 1), (8, 16, 1, 2), (8, 16, 3, 2), (4, 16, 3, 2)),
        *((8, 16, 3, 4), (16, 16, 2, 4), (4, 32, 2, 2), (8, 32, 2, 4), (4, 64, 1, 4), (2, 64, 1, 4)),
    )
]


def tune() -> None:
    """Print the five best sizes of every product of Phi-3.5."""
    for name, layouts, bytes_each in (
        ("matvec", PLAIN, DTYPE.itemsize),
        ("nf4_matvec", PACKED, 0.5 + 1 / 64),
    ):
        for outputs, inputs in MODELS["phi-3.5"][4]:
            size, x, plain = outputs * inputs * bytes_each, random(1, inputs), random(outputs, inputs)
            first = nf4_quantize(plain) if name == "nf4_matvec" else None
            weights: list[Any] = [
                plain.clone() if first is None
                else Nf4(first.packed.clone(), first.absmax, first.shape, DTYPE, *nested_of(first))
                for _ in range(copies(size))
            ]  # fmt: skip
            results = []
            for layout in layouts:
                setattr(matvec_kernels, f"{name}_layout", lambda *_, layout=layout: dict(layout))
                results.append((microseconds([functools.partial(matvec, x, w) for w in weights]), layout))
            results.sort(key=lambda pair: pair[0])
            print(f"{name} ({outputs}, {inputs})")
            for taken, layout in results[:5]:
                print(
                    f"  {taken:7.2f} us {size / taken / 1e3:6.0f} GB/s  {list(layout.values())}", flush=True
                )


if __name__ == "__main__":
    main()
