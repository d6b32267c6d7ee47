"""Every kernel compiles for each generation of GPU, without one, and fits what a block may take of it."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="compiles the kernels")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "cubins.py"


@pytest.fixture(scope="module")
def cubins() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("cubins", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cubins"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_every_kernel_fits(cubins: ModuleType, capability: int) -> None:
    for case in cubins.cases(capability):
        found = cubins.usage(case, capability)
        where = f"{case.kernel.__name__} {case.size} sm_{capability}: {found}"
        assert found.shared <= cubins.SHARED_LIMIT[capability], where
        if not case.may_spill:
            assert found.spilled == 0, where


def test_no_kernel_is_forgotten(cubins: ModuleType) -> None:
    from triton.runtime import JITFunction

    listed = {case.kernel.__name__ for case in cubins.cases(90)}
    names = "attention cache gated_activation matvec nf4 paged_attention rms_norm rotary".split()
    modules = [getattr(cubins, name) for name in names]
    written = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("kernel")
    }
    assert listed == written
