"""GGUF, the file format of llama.cpp, Ollama and LM Studio: written and verified without a compiler."""

from fettle.export.gguf.adapter import export_adapter_gguf
from fettle.export.gguf.job import export_gguf
from fettle.export.gguf.types import QUANTIZATIONS
from fettle.export.gguf.verify import Verification, verify
from fettle.export.gguf.write import write_gguf

__all__ = ["QUANTIZATIONS", "Verification", "export_adapter_gguf", "export_gguf", "verify", "write_gguf"]
