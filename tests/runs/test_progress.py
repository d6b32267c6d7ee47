"""Progress: what real runs of the stock trainer report, and how a terminal and a file show it."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from transformers import Phi3Config, Phi3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from fettle.cli.display import Display
from fettle.events import Training, ignore
from fettle.events import progress as task_progress
from fettle.runs.progress import Point, _Pace, peak_memory_bytes, points, report_progress

TOKENS_PER_STEP = 2 * 8  # batch x length, in the runs below


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def display(*, is_terminal: bool, line_seconds: float = 5.0) -> Display:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=90, legacy_windows=False)
    found = Display(console)
    found.line_seconds = line_seconds
    return found


def shown(screen: Display) -> str:
    return screen.out.file.getvalue()


def make_trainer(folder, max_steps: int = 4, **arguments) -> Trainer:
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = torch.arange(3, 11).tolist()
    rows = [{"input_ids": ids, "attention_mask": [1] * 8, "labels": ids}] * 40
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        max_steps=max_steps,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy=arguments.pop("save_strategy", "no"),
        **arguments,
    )
    return Trainer(Phi3ForCausalLM(config), args, train_dataset=rows, eval_dataset=rows[:6])


def test_lines_where_there_is_no_terminal(tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    screen = display(is_terminal=False, line_seconds=0.0)
    report_progress(trainer, screen)
    trainer.train()
    lines = shown(screen).splitlines()
    assert lines[-1].startswith("step 4/4") and lines[-1].endswith("done")
    first_with_loss = next(line for line in lines if "loss" in line)
    assert re.fullmatch(
        r"step 1/4  loss \d\.\d{4}  [\d,]+ tokens/s  [\d.]+ [MG]B peak memory"
        r"  0:00:\d\d elapsed  \d:\d\d:\d\d left",
        first_with_loss,
    )
    assert "\x1b" not in shown(screen)
    printed = capsys.readouterr()  # and the trainer's own display is gone
    assert "{'loss'" not in printed.out and "%|" not in printed.err


def test_lines_are_seconds_apart(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=12)
    screen = display(is_terminal=False, line_seconds=3600.0)
    report_progress(trainer, screen)
    trainer.train()
    assert [line.split("  ")[0] for line in shown(screen).splitlines()] == ["step 1/12", "step 12/12"]


def test_a_bar_on_a_terminal(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    screen = display(is_terminal=True)
    report_progress(trainer, screen)
    trainer.train()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(screen))
    last = text[text.rindex("training") :]
    assert "━" in last and "4/4" in last and "tokens/s" in last and "eval loss" in last and "memory" in last
    assert shown(screen).count("\x1b[?25l") == shown(screen).count("\x1b[?25h") == 1  # the cursor is back


def test_history_holds_every_logged_figure(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    progress = report_progress(trainer, ignore)
    trainer.train()
    assert [point.step for point in progress.history] == [1, 2, 3, 4]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [point.loss for point in progress.history] == logged
    assert [point.eval_loss is None for point in progress.history] == [True, False, True, False]
    assert all(point.learning_rate is not None and point.tokens_per_second for point in progress.history)
    assert all(point.memory_bytes and point.memory_bytes > 10_000_000 for point in progress.history)
    assert trainer.state.num_input_tokens_seen == 4 * TOKENS_PER_STEP
    assert progress.tokens_per_second is not None and progress.tokens_per_second > 0


def test_evaluation_is_shown_and_not_counted_as_training(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2
    )
    reported = []
    report_progress(trainer, reported.append)
    trainer.train()
    assert all(isinstance(event, Training) for event in reported)
    batches = [(n, 3) for n in (1, 2, 3)]
    seen = [(event.step, event.batch, event.batches) for event in reported]
    assert list(dict.fromkeys(seen)) == [
        (0, None, 0),
        *((step, *each) for step in (1, 2) for each in ((None, 0), *batches)),
    ]
    assert [event.is_over for event in reported] == [False] * (len(reported) - 1) + [True]
    assert reported[-1].eval_loss is not None and reported[-1].seconds_left is None

    screen = display(is_terminal=False, line_seconds=0.0)
    for event in reported:
        screen(event)
    assert "evaluating 2/3" in shown(screen)


def test_an_evaluation_ends_in_a_line_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    screen = display(is_terminal=False, line_seconds=3600.0)
    report_progress(trainer, screen)
    trainer.train()
    lines = shown(screen).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/2", "step 1/2", "step 2/2", "step 2/2"]
    assert ["eval loss" in line for line in lines] == [False, True, True, True]


def test_evaluation_alone_gives_the_terminal_back(tmp_path):
    trainer = make_trainer(tmp_path)
    screen = display(is_terminal=True)
    report_progress(trainer, screen)
    with screen:
        trainer.evaluate()
    assert "evaluating" in shown(screen) and screen._live is None


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    class StopAtTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                control.should_save = True
                control.should_training_stop = True

    first = make_trainer(tmp_path, max_steps=6)
    before = report_progress(first, ignore)
    first.add_callback(StopAtTwo())
    first.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(entry["memory_bytes"] > 0 for entry in state["log_history"] if "loss" in entry)

    second = make_trainer(tmp_path, max_steps=6)
    screen = display(is_terminal=False, line_seconds=0.0)
    progress = report_progress(second, screen)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert shown(screen).splitlines()[0] == "resumed at step 2/6"
    assert [point.step for point in progress.history] == [1, 2, 3, 4, 5, 6]
    assert progress.history[:2] == before.history
    assert second.state.num_input_tokens_seen == 6 * TOKENS_PER_STEP
    assert progress._pace is not None and progress._pace.first_tokens == 2 * TOKENS_PER_STEP


def test_an_interrupted_run_gives_the_terminal_back(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = make_trainer(tmp_path)
    screen = display(is_terminal=True)
    progress = report_progress(trainer, screen)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt), screen:
        trainer.train()
    assert shown(screen).rstrip("\n").endswith("\x1b[?25h")
    assert screen._live is None
    assert [point.step for point in progress.history] == [1]


def test_only_the_first_process_speaks(tmp_path):
    trainer = make_trainer(tmp_path)
    reported = []
    progress = report_progress(trainer, reported.append)
    trainer.is_world_process_zero = lambda: False
    trainer.train()
    assert reported == []
    assert len(progress.history) == 4


def test_pace_counts_steps_and_leaves_the_rest_out(monkeypatch):
    clock = 100.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    pace = _Pace(first_step=10, first_tokens=1000)
    assert pace.tokens_per_second(recent=True) is None and pace.seconds_left(10, 14) is None
    clock = 102.0
    pace.step_ended(tokens=1200)  # 200 tokens in 2 s
    clock = 150.0
    pace.something_else_ended()
    clock = 154.0
    pace.step_ended(tokens=1800)  # 600 tokens in 4 s
    assert pace.training_seconds == 6.0
    assert pace.tokens_per_second(recent=False) == pytest.approx(800 / 6)
    assert pace.seconds() == 54.0
    assert pace.seconds_left(step=12, total=14) == 54.0
    for step in range(30):
        clock += 1.0
        pace.step_ended(tokens=1800 + 10 * (step + 1))
    assert pace.tokens_per_second(recent=True) == pytest.approx(10.0)  # the slow past is forgotten


def test_points_merge_training_and_evaluation_of_one_step():
    log = [
        {"step": 1, "loss": 2.0, "learning_rate": 0.1, "epoch": 0.5, "grad_norm": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 1.5, "eval_runtime": 3.0},
        {"step": 2, "train_loss": 1.5, "train_runtime": 9.0},
    ]
    assert points(log) == [Point(step=1, loss=2.0, learning_rate=0.1), Point(step=2, loss=1.0, eval_loss=1.5)]


def test_peak_memory_grows_by_what_is_allocated_and_stays():
    cpu = torch.device("cpu")
    before = peak_memory_bytes(cpu)
    block = torch.ones(125_000_000)  # 500 MB, more than what a test before this one can have freed
    assert before + 90e6 < peak_memory_bytes(cpu) < before + 550e6
    peak = peak_memory_bytes(cpu)
    del block
    assert peak_memory_bytes(cpu) >= peak - 5e6  # the kernel counts in batches


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_share_of_a_task_is_shown_with_the_time_left(is_terminal):
    seconds, screen = [0.0], display(is_terminal=is_terminal)
    with task_progress("answering 16 questions", screen, clock=lambda: seconds[0]) as advance:
        for seconds[0], share in ((1.0, 0.1), (6.0, 0.25), (7.0, 0.3), (12.0, 0.5)):
            advance(share)
        if not is_terminal:
            assert shown(screen).splitlines() == [
                "answering 16 questions",
                "answering 16 questions: 25%, 0:00:18 left",
                "answering 16 questions: 50%, 0:00:12 left",
            ]
        seconds[0] = 24.0
    assert "took 0:00:24" in shown(screen)


def test_a_quick_task_takes_one_line():
    screen = display(is_terminal=False)
    for _ in range(2):
        with task_progress("answering 1 question", screen, clock=lambda: 0.0) as advance:
            advance(1.0)
    assert shown(screen) == "answering 1 question\n" * 2


def test_a_task_that_advances_with_every_token_is_not_reported_with_each():
    seconds, reported = [0.0], []
    with task_progress("answering", reported.append, clock=lambda: seconds[0]) as advance:
        for n in range(1000):
            seconds[0] += 0.001
            advance(n / 1000, f"{n} of 1000")
    assert 10 < len(reported) < 15
    assert (reported[0].share, reported[-1].share, reported[-1].is_over) == (0.0, 1.0, True)
    assert reported[1].done == "99 of 1000" and reported[1].seconds_left == pytest.approx(0.9, rel=0.02)
