"""Export a LoRA adapter without its base as GGUF, for llama.cpp's --lora with a GGUF file of the base."""

from pathlib import Path

from gguf import GGUFWriter

from fettle.adapters.lora import is_plain_lora
from fettle.adapters.model_ref import resolve
from fettle.errors import UserError, option
from fettle.export.gguf.metadata import as_stored, gguf_family_of, gguf_name
from fettle.export.gguf.write import require_name
from fettle.export.source import adapter_matrices, adapter_scale, require_plain
from fettle.files import require_new_file, write_aside


def export_adapter_gguf(name: str | Path, to: Path, *, overwrite: bool = False) -> Path:
    """Write a LoRA adapter in llama.cpp's format, in fp32, and return the file.

    llama.cpp scales B A by alpha / rank, so a rank-stabilized adapter's alpha is multiplied by sqrt(rank).
    Raises UserError if `name` is not an adapter's folder, not plain LoRA on linear layers, or if its base has changed.
    """
    require_name(to := Path(to))
    require_new_file(to, replace=overwrite)
    ref = resolve(name)
    config = ref.stored.config  # first, so that a broken model is reported as by every other command
    if ref.kind != "adapter":
        raise UserError(
            f"{ref.path} is not an adapter: give the output of fettle train, or use {option('format')} gguf."
        )
    adapter = ref.lora
    if not is_plain_lora(adapter, ref.shapes):
        raise UserError(
            f"{ref.path}: llama.cpp supports only plain LoRA of one rank, but this adapter has more (DoRA, biases, "
            "embeddings, whole modules, PiSSA, ranks per layer or the like): export the merged model, "
            f"{option('format')} gguf."
        )
    require_plain(config, adapter, ref.shapes, ref.path)
    with write_aside(to, replace=overwrite) as aside:
        writer = GGUFWriter(str(aside), gguf_family_of(config).architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", adapter_scale(adapter) * adapter.r)
        for each, a, b in adapter_matrices(ref.path):
            target = gguf_name(each, config)
            writer.add_tensor(f"{target}.lora_a", a.float().contiguous().numpy())
            writer.add_tensor(f"{target}.lora_b", as_stored(each, b.float(), config).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return to
