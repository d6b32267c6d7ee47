"""Tokens per second for a single request: prompt processing, and generation token by token."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

PROMPT_TOKENS, NEW_TOKENS = 512, 32
REPETITIONS = 3


@dataclass(frozen=True, slots=True)
class Speed:
    """The best of REPETITIONS, in tokens per second."""

    prompt: float
    generation: float


@torch.inference_mode()
def measure_speed(model: PreTrainedModel | PeftModel, ids: Sequence[int]) -> Speed:
    """Time the model on a prompt of at most PROMPT_TOKENS of `ids`, and on NEW_TOKENS generated after a few of them."""
    room = model.config.max_position_embeddings - NEW_TOKENS
    given = torch.tensor([list(ids)[: max(1, min(PROMPT_TOKENS, room))]], device=model.device)
    start = given[:, :8]
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )

    def read() -> None:
        model(input_ids=given, logits_to_keep=1, use_cache=False).logits.sum().item()

    def write() -> None:
        model.generate(start, attention_mask=torch.ones_like(start), generation_config=config).sum().item()

    return Speed(given.shape[1] / _seconds(read), NEW_TOKENS / _seconds(write))


def _seconds(work: Callable[[], None]) -> float:
    """Return the shortest of several times, after one warm-up run."""
    work()
    times = []
    for _ in range(REPETITIONS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)
