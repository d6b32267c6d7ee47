"""llama.cpp as a library: its C functions in the `xllamacpp` wheel, with their types declared.

Only stable parts of the interface are used. Parameter structs come from llama.cpp's own defaults and are passed back as
opaque bytes. The four sizes at the start of the context parameters are verified by their default values; a library
with different ones is refused.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

from fettle.errors import UserError, reason_of

OPAQUE_BYTES = 4096
"""More than the size of any parameter struct."""

DEFAULT_SIZES = (512, 2048, 512, 1)
"""n_ctx, n_batch, n_ubatch, n_seq_max."""

TESTED_RELEASE = "2026.10.11549"
"""Version of the wheel in constraints.txt."""

LINES_OF_LOG = 200
"""Lines of llama.cpp's log to keep, to find the reason for a failure."""


class Parameters(ctypes.Structure):
    """Parameters of a model or a context; for a context, `sizes` are those of DEFAULT_SIZES."""

    _fields_ = [("sizes", ctypes.c_uint32 * 4), ("rest", ctypes.c_byte * (OPAQUE_BYTES - 16))]


class Batch(ctypes.Structure):
    """llama_batch: tokens to run. Where `pos` is null, a token follows its sequence's last one."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_POINTER, _NUMBER, _FLAG, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
_NUMBERS = ctypes.POINTER(_NUMBER)
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, _TEXT, _POINTER)

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (ctypes.c_size_t, [_NUMBER, _POINTER, _POINTER, *[ctypes.c_int64] * 3, _POINTER]),
    "ggml_quantize_init": (None, [_NUMBER]),
    "ggml_row_size": (ctypes.c_size_t, [_NUMBER, ctypes.c_int64]),
    "llama_backend_init": (None, []),
    "llama_context_default_params": (Parameters, []),
    "llama_decode": (_NUMBER, [_POINTER, Batch]),
    "llama_detokenize": (_NUMBER, [_POINTER, _NUMBERS, _NUMBER, _TEXT, _NUMBER, _FLAG, _FLAG]),
    "llama_free": (None, [_POINTER]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_init_from_model": (_POINTER, [_POINTER, Parameters]),
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_memory_seq_cp": (None, [_POINTER, *[_NUMBER] * 4]),
    "llama_memory_seq_rm": (_FLAG, [_POINTER, _NUMBER, _NUMBER, _NUMBER]),
    "llama_model_chat_template": (_TEXT, [_POINTER, _TEXT]),
    "llama_model_default_params": (Parameters, []),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_model_has_decoder": (_FLAG, [_POINTER]),
    "llama_model_has_encoder": (_FLAG, [_POINTER]),
    "llama_model_load_from_file": (_POINTER, [_TEXT, Parameters]),
    "llama_model_meta_val_str": (_NUMBER, [_POINTER, _TEXT, _TEXT, ctypes.c_size_t]),
    "llama_model_n_ctx_train": (_NUMBER, [_POINTER]),
    "llama_model_n_embd": (_NUMBER, [_POINTER]),
    "llama_model_n_head": (_NUMBER, [_POINTER]),
    "llama_model_n_head_kv": (_NUMBER, [_POINTER]),
    "llama_model_n_layer": (_NUMBER, [_POINTER]),
    "llama_set_n_threads": (None, [_POINTER, _NUMBER, _NUMBER]),
    "llama_supports_gpu_offload": (_FLAG, []),
    "llama_token_to_piece": (_NUMBER, [_POINTER, _NUMBER, _TEXT, _NUMBER, _NUMBER, _FLAG]),
    "llama_tokenize": (_NUMBER, [_POINTER, _TEXT, _NUMBER, _NUMBERS, _NUMBER, _FLAG, _FLAG]),
    "llama_vocab_bos": (_NUMBER, [_POINTER]),
    "llama_vocab_eos": (_NUMBER, [_POINTER]),
    "llama_vocab_get_attr": (ctypes.c_int, [_POINTER, _NUMBER]),
    "llama_vocab_get_text": (_TEXT, [_POINTER, _NUMBER]),
    "llama_vocab_is_eog": (_FLAG, [_POINTER, _NUMBER]),
    "llama_vocab_n_tokens": (_NUMBER, [_POINTER]),
    "llama_vocab_pad": (_NUMBER, [_POINTER]),
}

log: list[str] = []
"""The last lines of llama.cpp's log."""


@_LOG
def _keep(level: int, text: bytes | None, data: Any) -> None:
    log.append((text or b"").decode("utf-8", "replace"))
    del log[:-LINES_OF_LOG]


@functools.cache
def library() -> ctypes.CDLL:
    """Return llama.cpp, ready to open files; UserError if the wheel is missing or has an unknown interface."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise UserError(
            "GGUF files run in llama.cpp, whose wheel is not installed: pip install xllamacpp (no compiler is needed)."
        )
    files = [file for ending in ("*.so", "*.pyd") for file in sorted(Path(spec.origin).parent.glob(ending))]
    try:
        llama = ctypes.CDLL(str(files[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(llama, name)
            function.restype, function.argtypes = result, arguments
    except (IndexError, OSError, AttributeError) as error:
        raise UserError(
            f"The installed xllamacpp cannot be used ({reason_of(error)}): pip install --upgrade xllamacpp."
        ) from error
    if (sizes := tuple(llama.llama_context_default_params().sizes)) != DEFAULT_SIZES:
        raise UserError(
            f"The installed xllamacpp has an unknown interface (its context parameters begin with {sizes}, expected "
            f"{DEFAULT_SIZES}): pip install xllamacpp=={TESTED_RELEASE}."
        )
    llama.llama_log_set(_keep, None)
    llama.llama_backend_init()
    return llama


def last_fault() -> str:
    """Return llama.cpp's own reason for the last failure: the first line of its log that mentions an error."""
    lines = [line.strip().rstrip(".") for line in "".join(log).splitlines() if line.strip()]
    faults = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    reason = (faults or lines or ["it gives no reason"])[0]
    return reason.rpartition("error loading model: ")[2].removeprefix("llama_model_load: ")
