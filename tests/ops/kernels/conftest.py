"""Kernels run on a GPU where there is one, and on the CPU in a process under Triton's interpreter."""

import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a kernel can run in this process."""
    pytest.importorskip("triton", reason="runs the kernels")
    if IS_INTERPRETED:
        _read_bounds_of_loops(monkeypatch)
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("runs in the interpreter's own process")
    return "cuda"


def _read_bounds_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter calls int() on arrays of one element, which numpy 2.4 no longer converts."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_item(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_item)
