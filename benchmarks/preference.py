"""DPO of real pairs: fettle next to TRL, at the same quantization, on the same tokens, rows and seed.

    python benchmarks/preference.py --pairs dpo_en_demo.json --tokenizer FOLDER --out preference.json
    python benchmarks/preference.py --pairs ... --tokenizer ... --quantization nf4 --model mistral-7b --layers 32

Weights are random, in a checkpoint that all read; TRL gets the batches that fettle makes. Contenders take turns, each
in a fresh process: TRL as it comes (with bitsandbytes for NF4), fettle, and fettle without sharing prompts. Seconds are
the sum over the steps after --warm, as batches differ; memory is the peak of training, whole and above the weights. On
a CPU without bf16 arithmetic TRL holds its weights in fp32: in bf16 its step would take hours. `--budget trl` gives
fettle TRL's peak as its budget.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import fresh
import torch
from contender import Clock, fill_adapter, materialise, peak_bytes, product_dtype, reset_peak
from datasets import Dataset
from machine import circumstances
from shapes import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

CONTENDERS = ("trl", "fettle", "fettle-unshared")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", nargs="?", choices=CONTENDERS, help="run it in this process")
    parser.add_argument("--pairs", type=Path, required=True, help="preference rows in any form")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="a folder with a tokenizer and a template"
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="zephyr-mid")
    parser.add_argument("--layers", type=int, help="of the model (default: all)")
    parser.add_argument("--quantization", choices=["nf4"])
    parser.add_argument("--batch", type=int, default=4, help="pairs per step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, with commas")
    parser.add_argument("--budget", help="fettle's memory budget, such as 8GB; trl: TRL's peak in this run")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is kept (default: a temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="append the figures to this JSON file")
    options = parser.parse_args()
    if options.contender:
        print(fresh.MARK + json.dumps(run(options)), flush=True)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    options.folder = options.folder or Path(tempfile.mkdtemp()) / "model"
    if not (options.folder / "config.json").exists():
        make_checkpoint(options)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for name in options.only.split(","):
            words = [name]
            for key, value in vars(options).items():
                if value is not None and key not in ("contender", "only", "rounds", "out", "budget"):
                    words += [f"--{key.replace('_', '-')}", str(value)]
            if options.budget and name != "trl":
                peak = max(each["peak_bytes"] for each in runs.get("trl", [{"peak_bytes": 0}]))
                words += ["--budget", f"{peak}B" if options.budget == "trl" else options.budget]
            found = fresh.run("preference.py", *words)
            print(json.dumps({"contender": name} | found), flush=True)
            runs.setdefault(name, []).append(found)
    base = runs.get("trl")
    rows = []
    for name, found in runs.items():
        seconds = statistics.median(each["seconds"] for each in found)
        row = {"contender": name, "seconds": seconds, **{key: found[0][key] for key in KEPT}}
        if base is not None:
            row["share_of_time"] = seconds / statistics.median(each["seconds"] for each in base)
            row["share_of_peak"] = found[0]["peak_bytes"] / base[0]["peak_bytes"]
            row["share_above_weights"] = _above(found[0]) / _above(base[0])
            row["largest_loss_difference"] = max(
                abs(mine - theirs) / abs(theirs)
                for mine, theirs in zip(found[0]["losses"], base[0]["losses"], strict=True)
            )
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        earlier = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
        about = {
            key: getattr(options, key)
            for key in ("model", "layers", "quantization", "batch", "steps", "warm", "budget")
        }
        gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
        content = {
            "kind": "preference",
            **circumstances(),
            **gpu,
            "rows": [*earlier, *({**about, **row} for row in rows)],
        }
        fresh.write(options.out, content)


KEPT = ("step_seconds", "peak_bytes", "weight_bytes", "losses", "dtype", "tokens")


def _above(found: dict[str, Any]) -> int:
    return int(found["peak_bytes"] - found["weight_bytes"])


def make_checkpoint(options: argparse.Namespace) -> None:
    facts = dict(SHAPES[options.model])
    if options.layers:
        facts["num_hidden_layers"] = options.layers
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts), dtype=torch.bfloat16)
    materialise(model, torch.device("cpu")).save_pretrained(options.folder)
    AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(options.folder)


def pairs_of(options: argparse.Namespace) -> list[Any]:
    """Return pairs whose sides fit into the maximum length, as many as the steps take."""
    from fettle.data import read_preferences, tokenize_preferences

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    rows = read_preferences(options.pairs, skip_bad_rows=True)
    found, _ = tokenize_preferences(rows, tokenizer, max_length=options.max_length, skip_bad_rows=True)
    return [_trained_only(pair) for pair in found[: options.steps * options.batch]]


def _trained_only(pair: Any) -> Any:
    """Return the pair without what a template writes after the answers, on which TRL would train."""
    changes = {}
    for side in ("chosen", "rejected"):
        labels = getattr(pair, f"{side}_labels")
        end = max(n for n, label in enumerate(labels) if label != -100) + 1
        changes |= {f"{side}_ids": getattr(pair, f"{side}_ids")[:end], f"{side}_labels": labels[:end]}
    return dataclasses.replace(pair, **changes)


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs, clock = pairs_of(options), Clock(device)
    make = trl_trainer if options.contender == "trl" else fettle_trainer
    trainer = make(options, pairs, clock, device)
    fill_adapter(trainer.model)
    weights = sum(each.numel() * each.element_size() for each in _stored(trainer.model))
    reset_peak(device)
    trainer.train()
    return {
        "seconds": sum(clock.seconds[options.warm :]),
        "step_seconds": clock.seconds,
        "peak_bytes": peak_bytes(device),
        "weight_bytes": weights,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "tokens": sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs),
    }


def _stored(model: Any) -> list[torch.Tensor]:
    """Return what holds the frozen weights; fettle's NF4 matrices are buffers."""
    frozen = [each for each in model.parameters() if not each.requires_grad]
    return frozen + [each for name, each in model.named_buffers() if "absmax" in name or "packed" in name]


def _arguments(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "max_steps": options.steps, "per_device_train_batch_size": options.batch,
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "use_cpu": device.type == "cpu", "save_strategy": "no", "max_length": None,
        "dataloader_pin_memory": False, "bf16": False, "beta": 0.1,
    }  # fmt: skip


def trl_trainer(options: argparse.Namespace, pairs: list[Any], clock: Clock, device: torch.device) -> Any:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer

    from fettle.methods.preference import ComparingTrainer, PairTrainer

    class Prepared(DPOTrainer):
        columns = PairTrainer.columns
        _get_train_sampler = ComparingTrainer._get_train_sampler  # the same batches

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    more: dict[str, Any] = {}
    dtype = product_dtype(device)
    if options.quantization:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype, device_map=str(device), **more)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = Dataset.from_dict({name: [getattr(pair, name) for pair in pairs] for name in names})
    return Prepared(
        model=model,
        args=DPOConfig(**_arguments(options, device)),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(options.tokenizer),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )


def fettle_trainer(options: argparse.Namespace, pairs: list[Any], clock: Clock, device: torch.device) -> Any:
    from trl import DPOConfig

    from fettle import terminal
    from fettle.adapters.lora import adapt
    from fettle.adapters.model_ref import resolve
    from fettle.cli.display import Display
    from fettle.methods.preference import PAIRS, PairTrainer, pair_collator
    from fettle.models.load import load_model
    from fettle.runs import head
    from fettle.runs.memory_plan import plan_run
    from fettle.runs.options import TrainOptions

    if options.contender == "fettle-unshared":
        head._can_share = lambda *_: False
    run_options = TrainOptions(
        model=str(options.folder), data="", output="", method="dpo", batch_size=options.batch,
        gradient_accumulation_steps=1, quantization=options.quantization, memory=options.budget,
    )  # fmt: skip
    ref = resolve(str(options.folder))
    lengths = [PAIRS.lengths(pair) for pair in pairs]
    run_plan = plan_run(run_options, ref.stored, device, lengths, 1, Display(terminal.console(stderr=True)))
    base = load_model(ref.base, dtype=run_plan.work.dtype, device=device, quantization=options.quantization)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    arguments = _arguments(options, device) | {
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
    }
    trainer = PairTrainer(
        model=adapt(base, rank=16),
        args=DPOConfig(**arguments),
        train_dataset=PAIRS.dataset(pairs),
        processing_class=tokenizer,
        data_collator=pair_collator(tokenizer),
        callbacks=[clock],
        use_leaner_plan=run_plan.use_leaner_plan,
    )
    run_plan.apply_to(base)
    counts = {policy.name: count for policy, count in run_plan.plan.counts().items()}
    print(json.dumps({"layers": counts, "planned_bytes": run_plan.plan.peak, "tokens": run_plan.work.tokens}))
    return trainer


if __name__ == "__main__":
    main()
