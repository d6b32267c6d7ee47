"""What `fettle train` and `fettle pretrain` can be told. A None means: chosen from the model and the data.

`defaults.py` makes those choices; the run writes them out complete, so that it can be repeated.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Device = Literal["cpu", "cuda"]
TrainDtype = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["cosine", "linear", "constant"]
Quantization = Literal["nf4"]
TrainOn = Literal["assistant", "all"]


def _option(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True, slots=True)
class LoopOptions:
    """The optimisation loop, the same for every kind of training."""

    output: str = field(metadata={"help": "folder for the result; it must be new"})
    max_length: int | None = _option("longest row in tokens (default: the model's context, at most 2048)")
    packing: bool = _option("lay several short rows into one, each seeing only itself", True)
    epochs: float | None = _option("passes over the data (default: 3)")
    max_steps: int | None = _option("stop after this many steps; wins over --epochs")
    batch_size: int | None = _option("rows, or packs, side by side (default: 1)")
    gradient_accumulation_steps: int | None = _option("batches a step (default: by the amount of data)")
    learning_rate: float | None = _option("peak learning rate (default: by the model's size)")
    schedule: Schedule = _option("how the learning rate falls after the warm-up", "cosine")
    warmup_ratio: float = _option("share of the steps in which the learning rate rises", 0.05)
    weight_decay: float = _option("AdamW's weight decay", 0.0)
    max_grad_norm: float = _option("gradients longer than this are shortened to it", 1.0)
    gradient_checkpointing: bool | None = _option(
        "redo every layer in the backward pass, or none (default: as many as the memory asks for)"
    )
    eval_fraction: float = _option("share of the rows held out to measure the result", 0.05)
    eval_data: str | None = _option("rows to measure on instead, in any form that --data takes")
    eval_steps: int | None = _option("steps between evaluations (default: a fifth of the run)")
    save_steps: int | None = _option("steps between checkpoints to resume from (default: a tenth of the run)")
    keep_data: str | None = _option("rows of what the model can do already, answered before and after too")
    skip_bad_rows: bool = _option(
        "leave out and count rows that cannot be trained on, instead of stopping at them", False
    )
    samples: int = _option(
        "rows of each kind answered before and after; a share of them goes in the report", 16
    )
    device: Device | None = _option("where to compute (default: cuda where there is one)")
    seed: int = _option("seed of everything random", 0)


@dataclass(kw_only=True, slots=True)
class TrainOptions(LoopOptions):
    """Options of `fettle train`."""

    model: str = field(metadata={"help": "checkpoint folder, hub name, or fettle-tiny, the embedded model"})
    data: str = field(
        metadata={
            "help": ".jsonl, .json, .csv, .parquet, .arrow or .txt file, a folder of them, or a hub name"
        }
    )
    train_on: TrainOn = _option("take the loss on the assistant's turns only, or on all tokens", "assistant")
    dtype: TrainDtype = _option("type of the frozen weights (auto: as stored; never fp16)", "auto")
    quantization: Quantization | None = _option(
        "hold the frozen weights in 4 bits (default: as --dtype says)"
    )
    memory: str | None = _option("memory the run may use, as 8GB (default: what the device has free)")
    remeasure: bool = _option("measure the device's speed again instead of using the cached figures", False)
    rank: int = _option("width of the LoRA adapters", 16)
    alpha: float | None = _option("the adapters' update is scaled by alpha / rank (default: rank)")
    dropout: float = _option("dropout on the adapters' input", 0.0)
    target_modules: list[str] | None = _option("layers to adapt (default: every linear layer but the head)")


@dataclass(kw_only=True, slots=True)
class PretrainOptions(LoopOptions):
    """Options of `fettle pretrain`: a new model from nothing."""

    data: str = field(
        metadata={
            "help": ".jsonl, .json, .csv, .parquet, .arrow or .txt file, a folder of them, or a hub name"
        }
    )
    train_on: TrainOn = _option("take the loss on the assistant's turns only, or on all tokens", "all")
    family: Literal["phi3", "llama", "mistral", "qwen2", "qwen3", "gemma2"] = _option("architecture", "phi3")
    vocab_size: int = _option("tokens of the tokenizer, which is learnt from the data", 1024)
    hidden_size: int = _option("width of the model", 256)
    intermediate_size: int = _option("width of its MLPs", 704)
    layers: int = _option("number of layers", 4)
    heads: int = _option("attention heads", 4)
    key_value_heads: int | None = _option("key-value heads (default: as many as heads)")
    context: int = _option("longest text the model is made for, in tokens", 2048)
    save_dtype: Literal["float32", "bfloat16"] = _option("type of the saved weights", "bfloat16")


@dataclass(kw_only=True, slots=True)
class PlanOptions:
    """Options of `fettle plan`."""

    model: str = field(metadata={"help": "folder with a config.json, hub name, or fettle-tiny"})
    context: int | None = _option("tokens of a row (default: the model's context, at most 2048)")
    memory: str | None = _option("memory the run may use, as 16GB (default: what the device has free)")
    rank: int = _option("width of the LoRA adapters", 16)
    dropout: float = _option("dropout on the adapters' input", 0.0)
    target_modules: list[str] | None = _option("layers to adapt (default: every linear layer but the head)")
    gradient_checkpointing: bool | None = _option(
        "redo every layer in the backward pass, or none (default: as many as the memory asks for)"
    )
    quantization: Quantization | None = _option("hold the frozen weights in 4 bits")
    dtype: TrainDtype = _option("type of the frozen weights (auto: as stored; never fp16)", "auto")
    batch_size: int = _option("rows side by side", 1)
    gradient_accumulation_steps: int = _option("batches a step", 1)
    device: Device | None = _option("where to compute (default: cuda where there is one)")
    remeasure: bool = _option("measure the device's speed again instead of using the cached figures", False)
    json: bool = _option("print the plan as JSON", False)
