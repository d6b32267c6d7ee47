"""The proof as a table: every file in llama.cpp beside the model it was made from."""

from pathlib import Path

import psutil
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from fettle.adapters.load import load
from fettle.export.gguf.verify import verify
from fettle.export.merge import merge
from fettle.export.source import Source
from fettle.files import human_bytes
from fettle.models.decoder import causal_lm_class
from fettle.quantization.layers import dequantize_linears

FP32_SHARE = 0.6
"""Of the free memory: a source model larger than this in fp32 is compared in its own type."""


def print_proof(name: str | Path, source: Source, files: dict[str, Path], console: Console) -> None:
    """Run each file and print how it compares. Raises UserError where llama.cpp does not run one."""
    model = _model(name, source)
    table = Table(title="in llama.cpp", title_justify="left", title_style="bold", box=None, padding=(0, 2))
    for column in (
        "file",
        "size",
        "texts alike",
        "mean KL",
        "top token alike",
        "greedy alike",
    ):
        table.add_column(column, justify="left" if column == "file" else "right")
    unequal: tuple[str, ...] = ()
    for path in files.values():
        proof = verify(path, model, source.tokenizer)
        unequal = proof.unequal
        table.add_row(
            path.name,
            human_bytes(path.stat().st_size),
            f"{proof.texts_equal} of {proof.texts}",
            f"{proof.kl:.1e}",
            f"{proof.top_agreement:.0%}",
            f"{proof.continuation_equal} of {proof.continuation_tokens}",
        )
    console.print(table)
    if unequal:
        texts = ", ".join(repr(text[:40]) for text in unequal[:3])
        line = f"llama.cpp cuts some texts otherwise than the model's tokenizer: {texts}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _model(name: str | Path, source: Source) -> PreTrainedModel:
    """The model whole, an adapter merged in: in fp32 where memory allows, as rounding would count as the file's."""
    with torch.device("meta"):
        empty = causal_lm_class(source.config.model_type)(source.config)
    weights = sum(each.numel() for each in empty.parameters())
    is_small = 4 * weights < FP32_SHARE * psutil.virtual_memory().available
    model, tokenizer = load(name, dtype="float32" if is_small else "auto", device="cpu")
    dequantize_linears(model)
    return merge(model, tokenizer) if isinstance(model, PeftModel) else model
