"""fettle: fine-tune small language models, with proof that they got better.

    import fettle

    model, tokenizer = fettle.load("fettle-tiny")          # a transformers PreTrainedModel and its tokenizer
    print(fettle.generate(model, tokenizer, "Spell cat."))

    outcome = fettle.train(fettle.TrainOptions(model="fettle-tiny", data="chats.jsonl", output="my-model"))
    model, tokenizer = fettle.load("my-model")             # a PEFT PeftModel on its base
    fettle.export_safetensors("my-model", "my-model-merged")
    fettle.export_gguf("my-model", "my-model.gguf")

Names are imported on first use, so that `fettle --help` starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fettle.adapters.lora import adapt, attach
    from fettle.data import collator, pack, read_rows, split_held_out, tokenize_rows
    from fettle.data.inspect import DataReport, inspect_data
    from fettle.engine.load import load
    from fettle.engine.request import Sampling
    from fettle.engine.text import Engine, generate
    from fettle.errors import Interrupted, UserError
    from fettle.evaluation.comparison import Comparison
    from fettle.evaluation.side_by_side import compare
    from fettle.export.checkpoint import export_safetensors
    from fettle.export.gguf import export_gguf
    from fettle.export.merge import merge
    from fettle.methods.finetune import dry_run, resume_training, train
    from fettle.methods.pretrain import pretrain, resume_pretraining
    from fettle.models.save import save_model
    from fettle.runs.dry_run import DryRun
    from fettle.runs.options import PretrainOptions, TrainOptions
    from fettle.runs.outcome import Outcome
    from fettle.version import __version__

_HOME = {
    "Comparison": "fettle.evaluation.comparison",
    "DataReport": "fettle.data.inspect",
    "DryRun": "fettle.runs.dry_run",
    "Engine": "fettle.engine.text",
    "Interrupted": "fettle.errors",
    "Outcome": "fettle.runs.outcome",
    "PretrainOptions": "fettle.runs.options",
    "Sampling": "fettle.engine.request",
    "TrainOptions": "fettle.runs.options",
    "UserError": "fettle.errors",
    "adapt": "fettle.adapters.lora",
    "attach": "fettle.adapters.lora",
    "collator": "fettle.data",
    "compare": "fettle.evaluation.side_by_side",
    "dry_run": "fettle.methods.finetune",
    "export_gguf": "fettle.export.gguf",
    "export_safetensors": "fettle.export.checkpoint",
    "generate": "fettle.engine.text",
    "inspect_data": "fettle.data.inspect",
    "load": "fettle.engine.load",
    "merge": "fettle.export.merge",
    "pack": "fettle.data",
    "pretrain": "fettle.methods.pretrain",
    "read_rows": "fettle.data",
    "resume_pretraining": "fettle.methods.pretrain",
    "resume_training": "fettle.methods.finetune",
    "save_model": "fettle.models.save",
    "split_held_out": "fettle.data",
    "tokenize_rows": "fettle.data",
    "train": "fettle.methods.finetune",
}

_JOBS = (
    "compare",
    "dry_run",
    "export_gguf",
    "inspect_data",
    "pretrain",
    "resume_pretraining",
    "resume_training",
    "train",
)
"""Their events are shown in the terminal unless the caller passes `report`."""

__all__ = [  # the keys of _HOME, spelled out for type checkers
    "Comparison",
    "DataReport",
    "DryRun",
    "Engine",
    "Interrupted",
    "Outcome",
    "PretrainOptions",
    "Sampling",
    "TrainOptions",
    "UserError",
    "adapt",
    "attach",
    "collator",
    "compare",
    "dry_run",
    "export_gguf",
    "export_safetensors",
    "generate",
    "inspect_data",
    "load",
    "merge",
    "pack",
    "pretrain",
    "read_rows",
    "resume_pretraining",
    "resume_training",
    "save_model",
    "split_held_out",
    "tokenize_rows",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # reading it takes longer than all the rest of this file
        from fettle.version import __version__

        return __version__
    if name not in _HOME:
        raise AttributeError(f"module 'fettle' has no attribute '{name}'")
    found = getattr(import_module(_HOME[name]), name)
    if name in _JOBS:
        from fettle.cli.display import displayed

        found = displayed(found, progress_to_stderr=name in ("compare", "export_gguf", "inspect_data"))
        found.__module__ = __name__  # where pickle finds it
    return globals().setdefault(name, found)


def __dir__() -> list[str]:
    return __all__
