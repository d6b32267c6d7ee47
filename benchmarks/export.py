"""A full-size checkpoint to GGUF: seconds, and resident memory beyond the mapped file.

    python benchmarks/export.py [--model phi-3.5-mini] [--quantization q4_k_m] [--folder build]

Weights are random, the tokenizer is a placeholder of the right size. Needs disk for the model in bf16 and the result.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import fresh
import psutil
import torch
from contender import fill
from machine import circumstances
from safetensors.torch import save_file
from shapes import SHAPES

SHARD_BYTES = 4 * 10**9
INTERVAL = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="phi-3.5-mini")
    parser.add_argument("--quantization", nargs="+", default=["q4_k_m"])
    parser.add_argument("--folder", type=Path, default=Path("build/export"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "export.json")
    options = parser.parse_args()
    source, target = options.folder / options.model, options.folder / "model.gguf"
    shutil.rmtree(options.folder, ignore_errors=True)
    write_checkpoint(options.model, source)
    words = ["-m", "fettle", "export", "--model", str(source), "--format", "gguf", "--to", str(target)]
    found = watched([sys.executable, *words, "--quantization", *options.quantization])
    found["files"] = {path.name: path.stat().st_size for path in options.folder.glob("*.gguf")}
    content = {
        "kind": "export",
        "model": options.model,
        "quantizations": options.quantization,
    } | circumstances()
    fresh.write(options.out, content | found)
    print(json.dumps(found, indent=1))
    shutil.rmtree(options.folder)


def watched(command: list[str]) -> dict[str, float]:
    """Run it; its seconds, its highest resident memory, and the highest without pages of files."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    peaks = {"peak_resident_bytes": 0, "peak_own_bytes": 0}

    def watch() -> None:
        while process.poll() is None:
            try:
                memory = psutil.Process(process.pid).memory_info()
            except psutil.NoSuchProcess:
                return
            peaks["peak_resident_bytes"] = max(peaks["peak_resident_bytes"], memory.rss)
            peaks["peak_own_bytes"] = max(peaks["peak_own_bytes"], memory.rss - memory.shared)
            time.sleep(INTERVAL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code != 0:
        raise SystemExit(f"the export failed with exit code {code}")
    return {"seconds": time.perf_counter() - began} | peaks


def write_checkpoint(model: str, folder: Path) -> None:
    """Shard by shard, so that this process stays small."""
    from transformers import AutoConfig

    from fettle.models.decoder import causal_lm_class
    from fettle.models.save import save_tokenizer

    content = dict(SHAPES[model])
    config = AutoConfig.for_model(content.pop("model_type"), **content, dtype="bfloat16")
    with torch.device("meta"):
        empty = causal_lm_class(config.model_type)(config)
    folder.mkdir(parents=True)
    config.architectures = [type(empty).family.architecture]
    config.save_pretrained(folder)
    save_tokenizer(_tokenizer(config.vocab_size), folder)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    names = list(empty.state_dict())
    for name in names:
        shard[name] = torch.empty(empty.state_dict()[name].shape, dtype=torch.bfloat16)
        fill(name, shard[name])
        if sum(each.nbytes for each in shard.values()) > SHARD_BYTES or name == names[-1]:
            file = f"model-{len(set(places.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tokenizer(size: int):  # type: ignore[no-untyped-def]
    """Bytes, and numbered pieces up to `size`."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"piece{number}" for number in range(size - len(pieces))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


if __name__ == "__main__":
    main()
