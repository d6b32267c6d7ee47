"""What every test stands on: no network, no telemetry, no shared caches, one thread, quick tests first."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# These are read when the libraries are imported, so they come before any such import; commands that tests
# start inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # torch's threads: the tests run on as many workers as there are cores
)

# A hub cache of our own, so that no test finds a model that only this machine has. Workers share the first's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="fettle-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers, configurations and rows; a clone without them skips the tests that ask for them."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real checkpoints and rows of ../shared/data, which are not here")
    return SHARED_DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first: a mistake shows early."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
