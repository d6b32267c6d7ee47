"""A GGUF file with the interface of a transformers model: `generate` and logits, computed by llama.cpp.

So generate, chat and compare work with a GGUF file as with a checkpoint, and show what llama.cpp, Ollama and LM Studio
will answer.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fettle.engine.llama_cpp.gguf_file import GGUFFile, supports_gpu
from fettle.engine.llama_cpp.tokenizer import LlamaCppTokenizer
from fettle.errors import UserError, option


class LlamaCppForCausalLM(PreTrainedModel, GenerationMixin):
    """Runs one text at a time, without gradients. The weights are in llama.cpp, not in PyTorch."""

    config_class = PreTrainedConfig
    is_batchable = False
    """Whether `generate` takes several texts at a time."""

    def __init__(self, file: GGUFFile) -> None:
        config = PreTrainedConfig(name_or_path=str(file.path))
        config.max_position_embeddings, config.vocab_size = file.context_length, file.vocab_size
        super().__init__(config)
        self.file = file

    @property
    def device(self) -> torch.device:
        """The device of ids and logits; llama.cpp itself may compute on a GPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # llama.cpp has its own

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return `forward`'s inputs for the next token: the whole text, of which only the new tokens are run."""
        return {"input_ids": input_ids, "logits_to_keep": 1, "use_cache": True}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, fp32 (1, N, vocabulary), of the positions `logits_to_keep` as in transformers (0: all).

        use_cache: logits of the last position only; the prefix shared with the previous call is not run again.
        attention_mask: ignored; all ones, as a single text has no padding.
        """
        (ids,) = input_ids.tolist()
        if use_cache:
            return CausalLMOutputWithPast(logits=self.file.next_logits(ids)[None, None])
        positions = torch.arange(len(ids))
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        chosen = positions[keep]
        logits = torch.empty(len(chosen), self.file.vocab_size)
        filled = 0
        for chunk in self.file.logits(ids, chosen.tolist()):
            logits[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return CausalLMOutputWithPast(logits=logits[None])


def open_gguf(
    path: Path, *, dtype: str = "auto", device: str | torch.device | None = None
) -> tuple[LlamaCppForCausalLM, LlamaCppTokenizer]:
    """Open a GGUF file in llama.cpp; return it as a model and a tokenizer.

    Raises UserError if it cannot be opened, llama.cpp is not installed, or dtype or device is not available.
    """
    if dtype != "auto":
        raise UserError(
            f"{option('dtype')} is {dtype}, but a GGUF file runs in the types it is stored in: leave it out."
        )
    if device is not None and torch.device(device).type == "cuda" and not supports_gpu():
        raise UserError(
            f"{option('device')} is cuda, but the installed llama.cpp (xllamacpp) runs only on the CPU: use cpu."
        )
    file = GGUFFile(path)
    model, tokenizer = LlamaCppForCausalLM(file), LlamaCppTokenizer(file)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.stop_ids())
    return model.eval(), tokenizer
