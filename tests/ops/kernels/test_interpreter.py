"""The kernels of this folder on a CPU: all its tests once more, in one process under Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="runs the kernels")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts that process")
def test_the_kernels_agree_in_the_interpreter() -> None:
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ended = subprocess.run(command, env=environment, cwd=folder.parents[2], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:]
    ran = set(re.findall(r"^PASSED \S*/(test_\w+\.py)::", ended.stdout, flags=re.MULTILINE))
    own = Path(__file__).name
    kernels = {file.name for file in folder.glob("test_*.py") if "kernel_device" in file.read_text()} - {own}
    assert ran == kernels != set()
