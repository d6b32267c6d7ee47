"""Tokens per second of the engine, next to transformers and to what the hardware allows.

    python benchmarks/generation.py --model phi-3.5-mini --out generation.json
    python benchmarks/generation.py --model phi-3.5-mini --nf4 --cases one,many
    python benchmarks/generation.py --gguf phi.gguf --cases one,prompt --prompt 512

Weights are random, prompts too, and nothing stops an answer, so every contender computes the same tokens' worth. A
figure is the best of --rounds after a warm-up. The ceilings are measured in the same process: reading every weight once
per token at the bandwidth of a large copy, and the bare products of a prompt.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from machine import circumstances
from shapes import SHAPES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from fettle.engine.base import TokenEngine
from fettle.engine.llama_cpp.engine import LlamaCppEngine
from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.engine.request import Request, Sampling, ScoreRequest
from fettle.engine.torch_engine import TorchEngine
from fettle.models.decoder import causal_lm_class
from fettle.models.rope import DecoderRotaryEmbedding
from fettle.ops.dispatch import best_product_dtype
from fettle.ops.nf4 import nf4_quantize
from fettle.quantization.layers import plain_linears
from fettle.quantization.nf4 import Nf4Linear

PROMPT, NEW = 128, 128
CHOICES, PREFIX, CHOICE = 1000, 1024, 40
"""Multiple-choice requests, tokens of the prefix that they share, tokens of each choice."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="phi-3.5-mini")
    parser.add_argument("--layers", type=int, help="of the model (default: all)")
    parser.add_argument("--nf4", action="store_true", help="quantize the layers' matrices")
    parser.add_argument(
        "--gguf", type=Path, help="time this file in llama.cpp instead of a model with random weights"
    )
    parser.add_argument("--cases", default="one,many,prompt,choices", help="with commas")
    parser.add_argument("--stock", action="store_true", help="time transformers too (not with --nf4)")
    parser.add_argument("--many", type=int, default=64, help="requests of the case `many`")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the case `prompt`")
    parser.add_argument("--new", type=int, default=NEW, help="new tokens per request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where the time of `one` goes")
    parser.add_argument("--out", type=Path, help="append the figures to this JSON file")
    options = parser.parse_args()
    cases = options.cases.split(",")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = Random(0)

    def tokens(count: int) -> list[int]:
        return [random.randrange(10, 30000) for _ in range(count)]

    if options.gguf:
        found = measure_engine(options, cases, tokens, LlamaCppEngine(GGUFFile(options.gguf)))
        keep(options, {"model": options.gguf.stem, "llama.cpp": found})
        return
    model = build(options, device)
    weights = sum(each.numel() * each.element_size() for each in _read_per_token(model))
    figures: dict[str, Any] = {"model": options.model, "nf4": options.nf4, "weights_gb": weights / 1e9}
    bandwidth = copy_bandwidth(device)
    figures["ceiling"] = {"copy_gb_per_s": bandwidth / 1e9, "one": bandwidth / weights}
    if "prompt" in cases:
        figures["ceiling"]["prompt_ms"] = 1000 * products_seconds(model, options.prompt)
    print(json.dumps(figures), flush=True)
    engine = TorchEngine(model)
    figures["fettle"] = measure_engine(options, cases, tokens, engine)
    print(json.dumps({"fettle": figures["fettle"]}), flush=True)
    if options.profile:
        profile(engine, tokens(PROMPT), 8)
        profile(engine, tokens(options.prompt), 1)
    if options.stock:
        del engine
        figures["transformers"] = measure_stock(options, cases, tokens, model, device)
        print(json.dumps({"transformers": figures["transformers"]}), flush=True)
    keep(options, figures)


def keep(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print the figures, and append them to the file of `--out`."""
    print(json.dumps(figures), flush=True)
    if options.out:
        earlier = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
        gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
        content = {"kind": "generation", **circumstances(), **gpu, "rows": [*earlier, figures]}
        options.out.write_text(json.dumps(content, indent=1))


def build(options: argparse.Namespace, device: torch.device) -> Any:
    """Return fettle's decoder with random bf16 weights, one tensor at a time."""
    facts = dict(SHAPES[options.model])
    if options.layers:
        facts["num_hidden_layers"] = options.layers
    config = AutoConfig.for_model(**facts)
    with torch.device("meta"):
        model = causal_lm_class(config.model_type)(config).to(torch.bfloat16)
    model.model.rotary_emb = DecoderRotaryEmbedding(config)
    block = (torch.randn(1 << 20) * 0.02).to(device, torch.bfloat16)
    quantized = set(plain_linears(model)) if options.nf4 else set()

    def drawn(like: torch.Tensor) -> torch.Tensor:
        repeats = -(-like.numel() // len(block))
        return block.repeat(repeats)[: like.numel()].view(like.shape)

    for name, module in list(model.named_modules()):
        if name in quantized:
            model.set_submodule(name, Nf4Linear(nf4_quantize(drawn(module.weight))))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            value = value if parameter.dim() == 1 else drawn(parameter)
            model.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    return model.eval()


def _read_per_token(model: Any) -> list[torch.Tensor]:
    """Return the tensors of which a new token reads everything: all but the token embedding, unless it is tied."""
    found = dict(model.named_parameters()) | {
        name: each for name, each in model.named_buffers() if name.endswith("absmax")
    }
    if not model.config.tie_word_embeddings:
        found.pop("model.embed_tokens.weight")
    return list(found.values())


def measure_engine(
    options: argparse.Namespace, cases: list[str], tokens: Callable[[int], list[int]], engine: TokenEngine
) -> dict[str, float]:
    def generate(prompts: list[list[int]], new: int) -> None:
        engine.generate([Request(tokens=p, sampling=Sampling(max_new_tokens=new)) for p in prompts])

    def score(prefix: list[int], choices: list[list[int]]) -> None:
        engine.score(
            [
                ScoreRequest(tokens=prefix + c, positions=range(len(prefix), len(prefix) + len(c)))
                for c in choices
            ]
        )

    return measure(options, cases, tokens, generate=generate, score=score)


def measure(
    options: argparse.Namespace,
    cases: list[str],
    tokens: Callable[[int], list[int]],
    *,
    generate: Callable[[list[list[int]], int], Any],
    score: Callable[[list[int], list[list[int]]], Any],
) -> dict[str, float]:
    """Return tokens per second of `one` and `many`, milliseconds of `prompt`, requests per second of `choices`."""
    found = {}
    if "one" in cases:
        first = best(options.rounds, generate, lambda: ([tokens(PROMPT)], 1))
        rest = best(options.rounds, generate, lambda: ([tokens(PROMPT)], options.new)) - first
        found["one"] = (options.new - 1) / rest
    if "many" in cases:
        seconds = best(
            options.rounds, lambda: generate([tokens(PROMPT) for _ in range(options.many)], options.new)
        )
        found["many"] = options.many * options.new / seconds
    if "prompt" in cases:
        found["prompt_ms"] = 1000 * best(options.rounds, generate, lambda: ([tokens(options.prompt)], 1))
    if "choices" in cases:
        choices = [tokens(CHOICE) for _ in range(CHOICES)]
        found["choices"] = CHOICES / best(1, score, lambda: (tokens(PREFIX), choices))
    return found


def best(rounds: int, work: Callable[..., Any], inputs: Callable[[], tuple[Any, ...]] = tuple) -> float:
    """Return the least seconds of `rounds` runs after one to warm up, each with inputs of its own."""
    times = []
    for _ in range(rounds + 1):
        given = inputs()
        begun = time.perf_counter()
        work(*given)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a large copy reads and writes together."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best(5, lambda: target.copy_(source))


def products_seconds(model: Any, count: int) -> float:
    """Return the seconds for the bare products of `count` prompt tokens: one layer's, times the layers."""
    layer = model.model.layers[0]
    shapes = [(m.out_features, m.in_features) for m in layer.modules() if isinstance(m, nn.Linear)]
    # a CPU without bf16 arithmetic multiplies faster in fp32
    kind = {"dtype": best_product_dtype(model.device.type, torch.bfloat16), "device": model.device}
    work = [
        (torch.randn(count, inputs, **kind), torch.randn(outputs, inputs, **kind))
        for outputs, inputs in shapes
    ]
    return len(model.model.layers) * best(3, lambda: [x @ w.T for x, w in work])


def measure_stock(
    options: argparse.Namespace,
    cases: list[str],
    tokens: Callable[[int], list[int]],
    model: Any,
    device: torch.device,
) -> dict[str, Any]:
    """Time transformers with the same weights: `generate`, its continuous batching, and a forward pass per choice."""
    with torch.device("meta"):
        stock: Any = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.model.rotary_emb = type(stock.model.rotary_emb)(model.config).to(device)
    stock = stock.eval()

    def settings(new: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=2
        )

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts, device=device)
        stock.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings(new))

    @torch.inference_mode()
    def score(prefix: list[int], choices: list[list[int]]) -> None:
        for choice in choices[:50]:
            ids = torch.tensor([prefix + choice], device=device)
            kept = stock(ids, logits_to_keep=len(choice) + 1, use_cache=False).logits
            kept.float().log_softmax(-1).argmax(-1).tolist()

    found: dict[str, Any] = measure(options, cases, tokens, generate=generate, score=score)
    if "choices" in found:
        found["choices"] *= 50 / CHOICES  # only 50 of them were scored
    if "many" in cases and hasattr(stock, "generate_batch"):
        prompts = [tokens(PROMPT) for _ in range(options.many)]
        try:
            with torch.no_grad():
                seconds = best(
                    1, lambda: stock.generate_batch(prompts, generation_config=settings(options.new))
                )
            found["many_continuous"] = options.many * options.new / seconds
        except Exception as error:  # it needs optional packages on some machines
            found["many_continuous"] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


def profile(engine: TorchEngine, prompt: list[int], new: int) -> None:
    request = Request(tokens=prompt, sampling=Sampling(max_new_tokens=new))
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as recorded:
        engine.generate([request])
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70))


if __name__ == "__main__":
    main()
