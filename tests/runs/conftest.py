"""A run that ends abruptly in this process."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from fettle.runs.resume import MarkComplete


class Killed(BaseException):
    """Stands for kill -9: no code of the run sees it."""


@pytest.fixture
def killed_at_save(monkeypatch) -> Callable[[int], AbstractContextManager[None]]:
    """End the run in a `with` block as a kill does, once the checkpoint of the step given is complete."""

    @contextmanager
    def killed(step: int) -> Iterator[None]:
        on_save = MarkComplete.on_save

        def mark_then_die(callback, args, state, control, **kwargs):
            on_save(callback, args, state, control, **kwargs)
            if state.global_step == step:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(MarkComplete, "on_save", mark_then_die)
            with pytest.raises(Killed):
                yield

    return killed
