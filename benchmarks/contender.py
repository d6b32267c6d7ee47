"""One contender trains for a few steps in this process and prints what it took, as one line of JSON.

    python benchmarks/contender.py fettle --model phi-3.5-mini --tokens 1024 --memory 10.7GB
    python benchmarks/contender.py trl --model phi-3.5-mini --tokens 1024

Both get the same weights (random, drawn by the parameter's name), the same packs and TRL's own trainer; trl is
transformers + PEFT + TRL as they come, trl-liger the same with Liger's kernels. `compare.py` runs them in turn.
Weights are bf16 numbers, held in bf16; but on a CPU without bf16 arithmetic, where its backward pass would take hours,
TRL holds them in fp32.
"""

import argparse
import json
import resource
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from shapes import SHAPES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

CONTENDERS = ("fettle", "trl", "trl-liger", "unsloth")
BLOCK = 1 << 20


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    print("RESULT " + json.dumps(run(options)), flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build the contender, train, and return what it took."""
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    started = time.perf_counter()
    make: dict[str, Any] = {
        "fettle": fettle_trainer,
        "trl": trl_trainer,
        "trl-liger": trl_trainer,
        "unsloth": unsloth_trainer,
    }
    clock = Clock(device)
    reset_peak(device)
    trainer, plan = make[options.contender](options, device, clock)
    if options.method == "dpo":
        trainer.train_dataset = pairs(options, config_of(options).vocab_size)
    load_peak = peak_bytes(device)
    reset_peak(device)
    loaded = time.perf_counter() - started
    trainer.train()
    return {
        "contender": options.contender,
        "model": options.model or options.config,
        "method": options.method,
        "tokens": options.tokens,
        "documents": options.documents,
        "quantization": options.quantization,
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "memory": options.memory,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": clock.seconds,
        "peak_bytes": peak_bytes(device),
        "load_peak_bytes": load_peak,
        "load_seconds": loaded,
        "plan": plan,
    }


class Clock(TrainerCallback):
    """Seconds of each step; the GPU's queue is emptied at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._synchronize()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._synchronize()
        self.seconds.append(time.perf_counter() - self.begin)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def peak_bytes(device: torch.device) -> int:
    """The most bytes held since the last reset: by PyTorch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # of the high-water mark


# --- the same model, data and adapters for everyone --------------------------------------------------------


def fill(name: str, tensor: torch.Tensor) -> None:
    """Random numbers that hang on the name alone, the same in every process: a block, over and over."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    block = torch.randn(BLOCK, generator=generator).mul_(0.02).bfloat16().to(tensor.device, tensor.dtype)
    flat = tensor.data.view(-1)
    for start in range(0, flat.numel(), BLOCK):
        part = flat[start : start + BLOCK]
        part.copy_(block[: part.numel()])
    if tensor.dim() == 1:
        tensor.data.add_(1)


def fill_adapter(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            fill(name, parameter)


def materialise(model: nn.Module, device: torch.device) -> nn.Module:
    """Weights for a model made on the meta device; what is computed, not stored, is made anew."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = None
    model.to_empty(device=device)
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    for name, parameter in model.named_parameters():
        fill(name, parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("embed_scale"):  # Gemma 2's in stock transformers
            buffer.fill_(model.config.hidden_size**0.5)
    model.tie_weights()
    return model


def product_dtype(device: torch.device) -> torch.dtype:
    """The type that stock PyTorch multiplies fastest among bf16 and fp32."""
    is_emulated = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if is_emulated else torch.bfloat16


def config_of(options: argparse.Namespace) -> Any:
    content = dict(SHAPES[options.model]) if options.model else json.loads(Path(options.config).read_text())
    content.pop("auto_map", None)
    content.pop("quantization_config", None)
    if options.layers:
        content["num_hidden_layers"] = options.layers
        if content.get("layer_types"):
            content["layer_types"] = content["layer_types"][: options.layers]
    return AutoConfig.for_model(**content)


def packs(options: argparse.Namespace, vocabulary: int) -> Dataset:
    """Random tokens: `rows` packs of `documents` equal documents."""
    generator = torch.Generator().manual_seed(1)
    length = options.tokens // options.documents
    rows = [
        torch.randint(3, min(vocabulary, 32000), (options.tokens,), generator=generator).tolist()
        for _ in range(options.steps)
    ]
    return Dataset.from_dict(
        {"input_ids": rows, "labels": rows, "seq_lengths": [[length] * options.documents] * len(rows)}
    )


def pairs(options: argparse.Namespace, vocabulary: int) -> Dataset:
    """Random preference pairs: half of a row is the prompt, which both answers share."""
    generator = torch.Generator().manual_seed(1)
    half = options.tokens // 2
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    draws = torch.randint(3, min(vocabulary, 32000), (3, options.steps, half), generator=generator)
    return Dataset.from_dict(dict(zip(columns, draws.tolist(), strict=True)))


def arguments(options: argparse.Namespace, device: torch.device, **changes: Any) -> SFTConfig | DPOConfig:
    """TRL's defaults but for what makes runs comparable."""
    if options.method == "sft":
        changes["dataset_kwargs"] = {"skip_prepare_dataset": True}
    make = SFTConfig if options.method == "sft" else DPOConfig
    return make(
        output_dir=tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        max_length=None,
        dataloader_pin_memory=False,
        **changes,
    )


def tokenizer_of(options: argparse.Namespace) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def data_of(options: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """What a trainer is given of data: packs and their collator, or pairs, which DPO's trainer collates itself."""
    if options.method == "dpo":  # its trainer tokenises what it is given; `run` puts tokens in place
        return {
            "train_dataset": Dataset.from_list([dict.fromkeys(("prompt", "chosen", "rejected"), "<eos>")])
        }
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return {"train_dataset": packs(options, vocabulary), "data_collator": collator}


# --- contenders --------------------------------------------------------------------------------------------


def trl_trainer(options: argparse.Namespace, device: torch.device, clock: Clock) -> tuple[Any, None]:
    from peft import LoraConfig

    config = config_of(options)
    with torch.device("meta"):
        # Gemma 2 needs its soft cap, which PyTorch's fused attention leaves out
        attention = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}
        model = AutoModelForCausalLM.from_config(config, dtype=product_dtype(device), **attention)
    model = materialise(model, device)
    changes: dict[str, Any] = {"use_liger_kernel": True} if options.contender == "trl-liger" else {}
    if model.dtype == torch.float32:
        changes["bf16"] = False  # TRL's default would multiply in bf16 all the same
    if options.no_checkpointing:
        changes["gradient_checkpointing"] = False
    make = SFTTrainer if options.method == "sft" else DPOTrainer
    trainer = make(
        model=model,
        args=arguments(options, device, **changes),
        processing_class=tokenizer_of(options),
        **data_of(options, config.vocab_size),
        peft_config=LoraConfig(
            r=options.rank, lora_alpha=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    fill_adapter(trainer.model)
    return trainer, None


def fettle_trainer(options: argparse.Namespace, device: torch.device, clock: Clock) -> tuple[Any, Any]:
    from fettle import terminal
    from fettle.adapters.lora import adapt
    from fettle.cli.display import Display
    from fettle.methods.preference import PairTrainer
    from fettle.methods.sft import SupervisedTrainer
    from fettle.models.config import StoredModel
    from fettle.models.load import empty_model
    from fettle.recompute.allocator import restored_heap, set_heap
    from fettle.runs.memory_plan import plan_run
    from fettle.runs.options import TrainOptions

    config = config_of(options)
    data = data_of(options, config.vocab_size)
    is_dpo = options.method == "dpo"
    lengths = (
        [[options.tokens, options.tokens // 2]] if is_dpo else list(data["train_dataset"]["seq_lengths"])
    )
    run = TrainOptions(
        model="", data="", output="", rank=options.rank, memory=options.memory, batch_size=1,
        gradient_accumulation_steps=1, gradient_checkpointing={None: None, "none": False, "all": True}[options.redo],
        quantization=options.quantization,
    )  # fmt: skip
    stored = StoredModel(config, torch.bfloat16, is_nf4=False)
    run_plan = plan_run(run, stored, device, lengths, int(is_dpo), Display(terminal.console(stderr=True)))
    model = empty_model(config).to(torch.bfloat16)
    with restored_heap():
        set_heap("return")  # as load_model has it
        model = materialise_nf4(model, device) if options.quantization else materialise(model, device)
    adapted = adapt(model, rank=options.rank)
    fill_adapter(adapted)
    common = {
        "model": adapted,
        "args": arguments(options, device, gradient_checkpointing=False, bf16=False),
        "processing_class": tokenizer_of(options),
        "callbacks": [clock],
        **data,
    }
    if is_dpo:  # TRL's own collator, as its rows have no labels
        common["data_collator"] = DataCollatorForPreference(pad_token_id=0)
    make = PairTrainer if is_dpo else SupervisedTrainer
    trainer = make(**common, use_leaner_plan=run_plan.use_leaner_plan)
    run_plan.apply_to(model)
    plan = run_plan.plan
    return trainer, {
        "peak_bytes": plan.peak,
        "seconds": plan.seconds,
        "layers": {policy.name: count for policy, count in plan.counts().items()},
    }


def materialise_nf4(model: Any, device: torch.device) -> Any:
    """As `materialise`, each matrix quantised before the next is made; on a CPU the token table lies in a file, as that
    of a checkpoint would."""
    from fettle.models.offloaded_embedding import OffloadedEmbedding
    from fettle.quantization.nf4 import Nf4Linear

    if device.type == "cpu" and not model.config.tie_word_embeddings:
        table = torch.empty_like(model.model.embed_tokens.weight, device="cpu")
        fill("model.embed_tokens.weight", table)
        file = Path(tempfile.mkdtemp()) / "table"
        table.view(torch.uint8).numpy().tofile(file)
        model.model.embed_tokens = OffloadedEmbedding.mapped(
            file, 0, tuple(table.shape), table.dtype, model.config.pad_token_id
        )
        del table

    linear = [name for name, each in model.model.named_modules(prefix="model") if isinstance(each, nn.Linear)]
    for name in linear:  # not the modules themselves, which a list would keep alive
        module = model.get_submodule(name).to_empty(device=device)
        for leaf, parameter in module.named_parameters():
            fill(f"{name}.{leaf}", parameter)
        model.set_submodule(name, Nf4Linear.from_linear(module))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            real = nn.Parameter(torch.empty_like(parameter, device=device))
            fill(name, real)
            model.get_submodule(owner).register_parameter(leaf, real)
    model.tie_weights()
    return model


def unsloth_trainer(options: argparse.Namespace, device: torch.device, clock: Clock) -> tuple[Any, None]:
    raise SystemExit("unsloth is not installed here; see benchmarks/README.md for how to add it.")


def parser() -> argparse.ArgumentParser:
    """The command line; `gpu.py` makes its own runs with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--model", choices=sorted(SHAPES), help="a shape of shapes.py")
    parser.add_argument("--config", help="a config.json instead")
    parser.add_argument("--method", choices=["sft", "dpo"], default="sft", help="dpo: a pair of rows a step")
    parser.add_argument("--layers", type=int, help="fewer layers than the config's")
    parser.add_argument("--tokens", type=int, default=1024, help="of a pack")
    parser.add_argument("--documents", type=int, default=1, help="equal documents in a pack")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--memory", help="fettle's budget")
    parser.add_argument("--quantization", choices=["nf4"], help="fettle's weights")
    parser.add_argument("--redo", choices=["none", "all"], help="fettle: no layer is redone, or every one")
    parser.add_argument("--no-checkpointing", action="store_true", help="TRL: nothing is redone")
    return parser


if __name__ == "__main__":
    main()
