"""Run the quickstart's job and note its scores and time."""

import json
import tempfile
import time
from pathlib import Path

from machine import circumstances

from fettle.cli import quiet_libraries
from fettle.quickstart import quickstart


def main() -> None:
    """Run it in a folder that is thrown away afterwards."""
    quiet_libraries()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = quickstart(Path(folder) / "quickstart").report
    seconds = time.monotonic() - started
    scores = {score.name: {"before": score.before, "after": score.after} for score in report.scores}
    result = {
        "job_seconds": round(seconds, 1),
        "peak_memory_bytes": report.peak_memory_bytes,
        "training_tokens_per_second": round(report.tokens_per_second or 0),
        "scores": scores,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result | circumstances(), indent=2) + "\n")


if __name__ == "__main__":
    main()
