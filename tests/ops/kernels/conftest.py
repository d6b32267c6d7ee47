"""Kernels run on a GPU where there is one, and otherwise on the CPU, in a process under Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable

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


@pytest.fixture
def run_interpreted() -> Callable[[str], None]:
    """Runs a test file's kernels in a process under the interpreter, unless this process can run them itself."""
    pytest.importorskip("triton", reason="runs the kernels")
    if IS_INTERPRETED or torch.cuda.is_available():
        pytest.skip("the kernels run in this process")

    def run(file: str) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        assert " passed" in done.stdout, "no kernel was run"

    return run
