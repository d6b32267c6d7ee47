"""What a run asks of a method of training, which is one file in `methods/`."""

from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from fettle.events import Report
from fettle.runs.recovery import Recovery
from fettle.runs.rows import RunData


class Method(Protocol):
    """One way of training; `method_facts.py` has what is known of it without heavy imports."""

    def prepare(self, options: Any, tokenizer: PreTrainedTokenizerBase, longest: int) -> RunData:
        """Read, tokenize and lay out the rows. longest: the maximum tokens per row. Raises UserError or BadRows."""
        ...

    def trainer(self, options: Any, arguments: dict[str, Any], **parts: Any) -> Recovery:
        """Return the trainer. arguments: for the method's TRL config; parts: for the trainer itself."""
        ...

    def held_out(self, trainer: Recovery, when: str, report: Report) -> dict[str, float]:
        """Return the scores on the held-out rows, by the names of `Measurement.held_out`. when: as in `measure`."""
        ...
