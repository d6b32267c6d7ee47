"""Verify GGUF files against the model they were made from, and report the result as a table."""

import math
from pathlib import Path

import psutil
from transformers import PreTrainedModel

from fettle.errors import ProofError
from fettle.events import Message, Report, ResultTable
from fettle.export.gguf.verify import Verification, verify
from fettle.export.merge import load_merged
from fettle.export.source import Source
from fettle.files import human_bytes
from fettle.models.load import empty_model

NEAR = ("f32", "f16", "bf16", "q8_0")
"""Quantizations with negligible rounding: a larger divergence is a fault of the file."""

KL_ALLOWED = 2e-2
"""In nats. Measured on fettle-tiny and random models of every family: at most 1.3e-3, with the source in bf16."""

FP32_SHARE = 0.6
"""Share of the free memory: a source model larger than this in fp32 is compared in its own dtype."""


def prove(source: Source, files: dict[str, Path], report: Report) -> None:
    """Run each file and report how it compares.

    Raises UserError if llama.cpp does not run a file, ProofError if its output does not match the model's.
    """
    model = _model(source)
    proofs = {kind: verify(path, model, source.tokenizer) for kind, path in files.items()}
    columns = ("file", "size", "texts tokenized alike", "mean KL", "top-1 agreement", "greedy match")
    rows = tuple(
        (
            files[kind].name,
            human_bytes(files[kind].stat().st_size),
            f"{proof.texts_equal} of {proof.texts}",
            f"{proof.kl:.1e}",
            f"{proof.top_agreement:.0%}",
            f"{proof.continuation_equal} of {proof.continuation_tokens}",
        )
        for kind, proof in proofs.items()
    )
    report(ResultTable("in llama.cpp, compared with the model", columns, rows))
    if unequal := next(iter(proofs.values())).unequal:
        texts = ", ".join(repr(text[:40]) for text in unequal[:3])
        report(Message(f"llama.cpp tokenizes some texts differently from the model's tokenizer: {texts}"))
    if not next(iter(proofs.values())).chat_equal:
        report(Message("llama.cpp tokenizes chats differently from the model's tokenizer"))
    _require_alike(proofs, files)


def _require_alike(proofs: dict[str, Verification], files: dict[str, Path]) -> None:
    for kind, proof in proofs.items():
        if not proof.has_template:
            raise ProofError(f"{files[kind]} has no chat template, but the model has one: export it again.")
        allowed = KL_ALLOWED if kind in NEAR else math.inf
        if not proof.kl < allowed:  # also true for NaN
            expected = f"less than {allowed:g}" if kind in NEAR else "a number"
            raise ProofError(
                f"{files[kind]} does not match the model: the mean KL divergence is {proof.kl:.2g} nats, "
                f"expected {expected}; the file is kept for inspection, but do not use it."
            )


def _model(source: Source) -> PreTrainedModel:
    """Load the merged model: in fp32 if memory allows, as its own rounding would be attributed to the file."""
    weights = sum(each.numel() for each in empty_model(source.config).parameters())
    is_small = 4 * weights < FP32_SHARE * psutil.virtual_memory().available
    return load_merged(source.ref, dtype="float32" if is_small else "auto", device="cpu")[0]
