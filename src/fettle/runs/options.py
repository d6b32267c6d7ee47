"""Options of `fettle train`, `fettle pretrain` and `fettle plan`. None: chosen from the model and the data.

`defaults.py` makes these choices; the run saves all of them, so that it can be repeated.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from fettle.models.families import FAMILIES
from fettle.runs.method_facts import METHOD_FACTS, MethodName

Device = Literal["cpu", "cuda"]
TrainDtype = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["cosine", "linear", "constant"]
Quantization = Literal["nf4"]
TrainOn = Literal["assistant", "all"]
Tracker = Literal["trackio", "wandb"]
METHOD_HELP = "; ".join(f"{name}: {facts.help}" for name, facts in METHOD_FACTS.items())


def _option(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True, slots=True)
class LoopOptions:
    """Options of the training loop, shared by all kinds of training."""

    output: str = field(metadata={"help": "output folder; must be new or empty"})
    max_length: int | None = _option("maximum tokens per row (default: the model's context, at most 2048)")
    packing: bool = _option(
        "sft: pack several short rows into one sequence; each attends only to itself", True
    )
    epochs: float | None = _option("passes over the data (default: 3; of preference methods 1)")
    max_steps: int | None = _option("stop after this many steps; overrides --epochs")
    batch_size: int | None = _option(
        "packs, or rows without packing, or pairs, or labelled answers per batch (default: 1; kto: 4)"
    )
    gradient_accumulation_steps: int | None = _option(
        "batches per step (default: depends on the amount of data)"
    )
    learning_rate: float | None = _option("peak learning rate (default: depends on the model's size)")
    schedule: Schedule = _option("learning rate schedule after warmup", "cosine")
    warmup_ratio: float = _option("fraction of the steps used for learning rate warmup", 0.05)
    weight_decay: float = _option("AdamW weight decay", 0.0)
    max_grad_norm: float = _option("clip the gradient norm to this value", 1.0)
    gradient_checkpointing: bool | None = _option(
        "recompute every layer in the backward pass, or none (default: as many as the memory budget requires)"
    )
    eval_fraction: float = _option("fraction of the rows to hold out for evaluation", 0.05)
    eval_data: str | None = _option(
        "rows to evaluate on instead of a fraction of --data, in any format that --data accepts"
    )
    eval_steps: int | None = _option("steps between evaluations (default: a fifth of the run)")
    save_steps: int | None = _option("steps between checkpoints (default: a tenth of the run)")
    early_stopping: int | None = _option(
        "stop when the held-out loss has not fallen for this many evaluations; includes --keep-best"
    )
    keep_best: bool = _option(
        "save the result of the evaluation with the lowest held-out loss, not that of the last step", False
    )
    keep_data: str | None = _option(
        "rows of skills the model already has, also answered before and after training"
    )
    skip_bad_rows: bool = _option(
        "leave out and count rows that cannot be trained on, instead of stopping", False
    )
    samples: int = _option(
        "rows of each kind to answer before and after training; the report shows some of them", 16
    )
    report_to: Tracker | None = _option(
        "also send the metrics to trackio or wandb, a package to install first (default: none; files for TensorBoard "
        "are always written)"
    )
    device: Device | None = _option("device to run on (default: cuda if available)")
    seed: int = _option("random seed", 0)


@dataclass(kw_only=True, slots=True)
class TrainOptions(LoopOptions):
    """Options of `fettle train`."""

    model: str = field(metadata={"help": "checkpoint folder, hub name, or fettle-tiny, the embedded model"})
    data: str = field(
        metadata={
            "help": ".jsonl, .json, .csv, .parquet, .arrow or .txt file, a folder of them, or a hub name"
        }
    )
    method: MethodName = _option(METHOD_HELP, "sft")
    train_on: TrainOn = _option(
        "sft: compute the loss on the assistant's turns only, or on all tokens", "assistant"
    )
    beta: float | None = _option(
        "dpo, kto: how strongly to stay near the model before training (default: 0.1); simpo: scale of the reward "
        "(default: 2); orpo: weight of the preference (default: 0.1)"
    )
    loss: list[str] | None = _option(
        "dpo, kto: loss variants of TRL, each with or without a weight, such as sigmoid=1 sft=0.2 "
        "(default: sigmoid for dpo, kto for kto)"
    )
    label_smoothing: float | None = _option(
        "dpo: share of the pairs whose labels are assumed to be wrong (default: 0)"
    )
    margin: float | None = _option("simpo: how much higher a chosen answer's reward has to be (default: 1)")
    chat_template: str | None = _option(
        "format of chats: alpaca, chatml, gemma, llama-3, mistral, phi-3, vicuna, zephyr or a .jinja file (default: "
        "the model's own, or Zephyr's if it has none)"
    )
    dtype: TrainDtype = _option("dtype of the frozen weights (auto: as stored; never float16)", "auto")
    quantization: Quantization | None = _option("store the frozen weights in 4 bits (default: see --dtype)")
    memory: str | None = _option("memory budget, such as 8GB (default: the device's free memory)")
    remeasure: bool = _option("measure the device's speed again instead of using the cached result", False)
    rank: int = _option("LoRA rank", 16)
    alpha: float | None = _option(
        "LoRA alpha; the update is scaled by alpha / rank (default: rank; 4 with --rslora: a scale of 1 at rank 16)"
    )
    rslora: bool = _option(
        "rank-stabilized LoRA: scale the update by alpha / sqrt(rank), for ranks such as 64 and above", False
    )
    dropout: float = _option("LoRA dropout", 0.0)
    target_modules: list[str] | None = _option(
        "modules to adapt (default: every linear layer except the head)"
    )


@dataclass(kw_only=True, slots=True)
class PretrainOptions(LoopOptions):
    """Options of `fettle pretrain`."""

    data: str = field(
        metadata={
            "help": ".jsonl, .json, .csv, .parquet, .arrow or .txt file, a folder of them, or a hub name"
        }
    )
    train_on: TrainOn = _option("compute the loss on the assistant's turns only, or on all tokens", "all")
    family: Literal[tuple(FAMILIES)] = _option("architecture", "phi3")  # type: ignore[valid-type]
    vocab_size: int = _option("vocabulary size of the tokenizer, which is trained on the data", 1024)
    hidden_size: int = _option("hidden size of the model", 256)
    intermediate_size: int = _option("hidden size of the MLPs", 704)
    layers: int = _option("number of layers", 4)
    heads: int = _option("attention heads", 4)
    key_value_heads: int | None = _option("key-value heads (default: as many as heads)")
    context: int = _option("context length in tokens", 2048)
    save_dtype: Literal["float32", "bfloat16"] = _option("dtype of the saved weights", "bfloat16")


@dataclass(kw_only=True, slots=True)
class PlanOptions:
    """Options of `fettle plan`."""

    model: str = field(metadata={"help": "folder with a config.json, hub name, or fettle-tiny"})
    context: int | None = _option("tokens per row (default: the model's context, at most 2048)")
    method: MethodName = _option(METHOD_HELP, "sft")
    memory: str | None = _option("memory budget, such as 16GB (default: the device's free memory)")
    rank: int = _option("LoRA rank", 16)
    dropout: float = _option("LoRA dropout", 0.0)
    target_modules: list[str] | None = _option(
        "modules to adapt (default: every linear layer except the head)"
    )
    gradient_checkpointing: bool | None = _option(
        "recompute every layer in the backward pass, or none (default: as many as the memory budget requires)"
    )
    quantization: Quantization | None = _option("store the frozen weights in 4 bits")
    dtype: TrainDtype = _option("dtype of the frozen weights (auto: as stored; never float16)", "auto")
    batch_size: int | None = _option("rows, pairs or labelled answers per batch (default: 1; kto: 4)")
    gradient_accumulation_steps: int = _option("batches per step", 1)
    device: Device | None = _option("device to run on (default: cuda if available)")
    remeasure: bool = _option("measure the device's speed again instead of using the cached result", False)
    json: bool = _option("print the plan as JSON", False)
