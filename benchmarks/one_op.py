"""Every op alone, at Phi-3.5-mini's shapes, against the least that the machine needs for it.

    python benchmarks/one_op.py [--tokens 1024] [--out benchmarks/results/one_op.json]

The floor of an op is the larger of its bytes at the speed of a copy and its operations at that of bare products.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fresh
import torch
from ceiling import copy_rate, device_of, product_seconds, seconds_of
from machine import circumstances

from fettle.ops.attention import Documents, packed_attention
from fettle.ops.gated_activation import gated_activation_backward, gated_activation_forward
from fettle.ops.lora_linear import LowRank, lora_linear
from fettle.ops.lora_mlp import MLP, Projection, lora_mlp
from fettle.ops.nf4 import nf4_dequantize, nf4_quantize
from fettle.ops.rms_norm import rms_norm
from fettle.ops.rotary import apply_rotary
from fettle.ops.token_log_probs import token_log_probs
from fettle.recompute.allocator import set_heap

OUT = Path(__file__).parent / "results" / "one_op.json"
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, HEAD_SIZE, RANK = 3072, 8192, 32064, 32, 96, 16
BF16 = 2
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Op:
    """A call with the bytes it must move and the operations it must do."""

    name: str
    run: Callable[[], object]
    moved: int = 0
    operations: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    device = device_of(options.cpu)
    torch.manual_seed(0)
    if device.type == "cpu":
        set_heap("reuse")  # as training has it
    seconds = product_seconds(options.tokens, HIDDEN, 2 * INTERMEDIATE, device)
    products, copies = 4 * options.tokens * HIDDEN * INTERMEDIATE / seconds, copy_rate(device)
    content: dict[str, Any] = {"kind": "ops", "tokens": options.tokens} | circumstances()
    content |= {"operations_per_second": products, "copy_bytes_per_second": copies, "rows": []}
    for op in all_ops(options.tokens, device):
        row = asdict(op)
        del row["run"]
        row |= {
            "seconds": seconds_of(op.run, device),
            "floor_seconds": max(op.moved / copies, op.operations / products),
        }
        content["rows"].append(row)
        fresh.write(options.out, content)
        print(
            f"{op.name:32} {1e3 * row['seconds']:9.2f} ms, {row['seconds'] / row['floor_seconds']:5.1f} x the floor"
        )


def random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).mul_(0.02).bfloat16()


def all_ops(tokens: int, device: torch.device) -> Iterator[Op]:
    yield from pointwise(tokens, device)
    for documents in (1, 8):
        yield from attention(tokens, documents, device)
    yield from lora(tokens, device)
    yield from head(tokens, device)
    yield from nf4(tokens, device)


def with_backward(
    name: str, run: Callable[[], torch.Tensor], inputs: list[torch.Tensor], costs: tuple[int, int, int, int]
) -> Iterator[Op]:
    """An op's forward and backward apart. costs: bytes and operations of the one, then of the other."""
    output = run()
    grad = torch.ones_like(output)
    yield Op(f"{name} forward", lambda: run().detach(), costs[0], costs[1])
    yield Op(
        f"{name} backward",
        lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True),
        costs[2],
        costs[3],
    )


def pointwise(tokens: int, device: torch.device) -> Iterator[Op]:
    """Norm, rotary and gate: bound by the bytes they move."""
    x = random(device, tokens, HIDDEN).requires_grad_()
    weight = random(device, HIDDEN)
    size = tokens * HIDDEN * BF16
    yield from with_backward("rms_norm", lambda: rms_norm(x, weight, 1e-5), [x], (2 * size, 0, 3 * size, 0))
    query = random(device, 1, HEADS, tokens, HEAD_SIZE).requires_grad_()
    angles = torch.randn(1, tokens, HEAD_SIZE, device=device)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    yield from with_backward(
        "rotary", lambda: apply_rotary(query, cos, sin), [query], (2 * size, 0, 2 * size, 0)
    )
    gate, up, grad = (random(device, tokens, INTERMEDIATE) for _ in range(3))
    size = tokens * INTERMEDIATE * BF16
    yield Op("gate forward", lambda: gated_activation_forward(gate, up, "silu"), 3 * size)
    yield Op("gate backward", lambda: gated_activation_backward(grad, gate, up, "silu"), 6 * size)


def attention(tokens: int, documents: int, device: torch.device) -> Iterator[Op]:
    """Causal attention within equal documents: 4 operations a visible pair and channel forward, 10 backward."""
    length = tokens // documents
    is_start = torch.arange(tokens, device=device) % length == 0
    packed = Documents.from_starts(is_start)
    inputs = [random(device, tokens, HEADS, HEAD_SIZE).requires_grad_() for _ in range(3)]
    query, key, value = inputs
    pairs = documents * length * (length + 1) // 2 * HEADS * HEAD_SIZE
    size = tokens * HEADS * HEAD_SIZE * BF16
    yield from with_backward(
        f"attention {documents} x {length}",
        lambda: packed_attention(query, key, value, packed, scale=HEAD_SIZE**-0.5),
        inputs,
        (4 * size, 4 * pairs, 8 * size, 10 * pairs),
    )


def lora(tokens: int, device: torch.device) -> Iterator[Op]:
    """The projections of attention, and the MLP as one; the floor counts the frozen products alone."""
    x = random(device, tokens, HIDDEN).requires_grad_()

    def update(outputs: int, inputs: int) -> LowRank:
        a, b = torch.randn(RANK, inputs, device=device), torch.randn(outputs, RANK, device=device)
        return LowRank(a.mul_(0.02).requires_grad_(), b.mul_(0.02).requires_grad_(), 1.0)

    weight, low = random(device, 3 * HIDDEN, HIDDEN), update(3 * HIDDEN, HIDDEN)
    operations = 2 * tokens * 3 * HIDDEN * HIDDEN
    yield from with_backward(
        "lora_linear",
        lambda: lora_linear(x, weight, None, low.a, low.b, low.scale),
        [x, low.a, low.b],
        (0, operations, 0, operations),
    )
    gate_up = Projection(random(device, 2 * INTERMEDIATE, HIDDEN), rows := update(2 * INTERMEDIATE, HIDDEN))
    down = Projection(random(device, HIDDEN, INTERMEDIATE), columns := update(HIDDEN, INTERMEDIATE))
    mlp = MLP((gate_up,), down, "silu")
    operations = 2 * tokens * 3 * HIDDEN * INTERMEDIATE
    yield from with_backward(
        "lora_mlp",
        lambda: lora_mlp(x, mlp),
        [x, rows.a, rows.b, columns.a, columns.b],
        (0, operations, 0, operations),
    )


def head(tokens: int, device: torch.device) -> Iterator[Op]:
    """Log probabilities of the labels with the hidden states' gradient, which is computed in forward."""
    hidden = random(device, tokens, HIDDEN).requires_grad_()
    weight = random(device, VOCABULARY, HIDDEN)
    labels = torch.randint(0, VOCABULARY, (tokens,), device=device)
    yield Op(
        "token_log_probs both",
        lambda: token_log_probs(hidden, weight, labels).log_probs.sum().backward(),
        operations=2 * 2 * tokens * HIDDEN * VOCABULARY,
    )


def nf4(tokens: int, device: torch.device) -> Iterator[Op]:
    """A matrix unpacked, and the product that it is unpacked for."""
    plain = random(device, 2 * INTERMEDIATE, HIDDEN)
    packed, x = nf4_quantize(plain), random(device, tokens, HIDDEN)
    moved = plain.numel() * BF16 + plain.numel() * 33 // 64  # a half byte and a 64th of a byte of scale
    yield Op("nf4_dequantize", lambda: nf4_dequantize(packed, torch.bfloat16), moved)
    yield Op(
        "the product it feeds",
        lambda: torch.nn.functional.linear(x, plain),
        operations=2 * tokens * plain.numel(),
    )


if __name__ == "__main__":
    main()
