"""What this machine allows: bare matrix products at a model's shapes and a large copy, in a process of its own.

python benchmarks/ceiling.py --model phi-3.5-mini --tokens 1024
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from contender import config_of, parser, product_dtype
from torch.nn import functional as F

COPY_BYTES = 256 * 2**20
REPEATS = 5


def main() -> None:
    # the contender's own words; which one is of no matter here
    options = parser().parse_args(["fettle", *sys.argv[1:]])
    print("RESULT " + json.dumps(measure(config_of(options), options.tokens, device_of(options.cpu))))


def device_of(is_cpu: bool = False) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not is_cpu else "cpu")


def measure(config: Any, tokens: int, device: torch.device) -> dict[str, Any]:
    """Operations a second of a layer's products together, bytes a second of a copy, and the floor of a step."""
    matrices = layer_matrices(config)
    operations = 2 * tokens * sum(inputs * outputs for inputs, outputs in matrices)
    rate = operations / sum(product_seconds(tokens, *shape, device) for shape in matrices)
    return {
        "operations_per_second": rate,
        "copy_bytes_per_second": copy_rate(device),
        "floor_seconds": floor_seconds(config, tokens, rate),
    }


def layer_matrices(config: Any) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's four products, the matrices that share an input side by side."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    query, key = heads * size, config.num_key_value_heads * size
    intermediate = config.intermediate_size
    return [(hidden, query + 2 * key), (query, hidden), (hidden, 2 * intermediate), (intermediate, hidden)]


def floor_seconds(config: Any, tokens: int, rate: float) -> float:
    """Seconds of what no LoRA step can avoid: two passes, forward and the inputs' gradients, through every
    frozen matrix and the head, at `rate` operations a second. Attention and the adapters are not counted."""
    layer = sum(inputs * outputs for inputs, outputs in layer_matrices(config))
    weights = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    return 2 * 2 * weights * tokens / rate


def product_seconds(tokens: int, inputs: int, outputs: int, device: torch.device) -> float:
    """Seconds of one product (tokens, inputs) by (outputs, inputs), in bf16 where the device has it."""
    x = torch.randn(tokens, inputs, device=device, dtype=product_dtype(device))
    weight = torch.randn(outputs, inputs, device=device, dtype=x.dtype)
    return seconds_of(lambda: F.linear(x, weight), device)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES / seconds_of(lambda: target.copy_(source), device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call after one to warm up, with the GPU's queue empty at both ends."""
    run()
    times = []
    for _ in range(REPEATS):
        _synchronize(device)
        begin = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
