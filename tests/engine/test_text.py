"""Completions: one by one, in batches, streamed; stock transformers is the oracle."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from fettle.engine.load import load
from fettle.engine.request import Sampling
from fettle.engine.text import Engine, generate, stop_ids
from fettle.errors import UserError

PROMPTS = ["Say 3.", "What is the capital of France?", "Be brief, please. The quick brown fox"]
SHORT = Sampling(max_new_tokens=10)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture(scope="module")
def loaded(small_model):
    return load(small_model, device="cpu")


@pytest.fixture(scope="module")
def stock(small_model):
    return AutoModelForCausalLM.from_pretrained(small_model).eval()


def test_prompts_together_are_answered_as_each_alone(loaded, stock):
    model, tokenizer = loaded
    expected = []
    for prompt in PROMPTS * 2:
        text = Engine(model, tokenizer).text_of(prompt)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
        output = stock.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=stops)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(expected)) == len(PROMPTS)
    assert Engine(model, tokenizer).generate(PROMPTS * 2, SHORT) == expected
    assert Engine(model, tokenizer, running=2).generate(PROMPTS * 2, SHORT) == expected


def test_every_finished_text_is_told(loaded):
    engine, told = Engine(*loaded), {}
    texts = [engine.text_of(prompt) for prompt in PROMPTS]
    answers = engine.complete(texts, SHORT, is_rendered=True, on_answer=told.__setitem__)
    assert [told[n] for n in range(len(PROMPTS))] == answers


def test_equal_prompts_with_a_seed_get_answers_of_their_own(loaded):
    sampling = Sampling(max_new_tokens=10, temperature=1.5, seed=7)
    first = Engine(*loaded).generate(["Say 3."] * 4, sampling)
    assert len(set(first)) > 1
    assert Engine(*loaded).generate(["Say 3."] * 4, sampling) == first


@pytest.mark.parametrize("sampling", [SHORT, Sampling(max_new_tokens=10, temperature=1.3, top_p=0.9, seed=4)])
def test_streamed_pieces_are_the_whole_answer(loaded, sampling):
    engine = Engine(*loaded)
    for prompt in PROMPTS:
        assert "".join(engine.stream(prompt, sampling)) == engine.generate([prompt], sampling)[0]


def test_an_answer_ends_at_the_end_of_turn_even_where_the_checkpoint_forgot_it(loaded):
    """The small model's generation_config.json names <|endoftext|> alone; its template ends turns with <|end|>."""
    model, tokenizer = loaded
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert stop_ids(model.generation_config.eos_token_id, tokenizer) == [tokenizer.eos_token_id, end]
    forced = torch.full((1, model.config.vocab_size), -1e4)
    forced[..., end] = 1e4
    hook = model.lm_head.register_forward_hook(lambda *_: forced)
    try:
        assert generate(model, tokenizer, "Say 3.", sampling=Sampling(max_new_tokens=200)) == ""
    finally:
        hook.remove()


def test_the_model_is_left_in_the_mode_it_was_in(loaded):
    model, tokenizer = loaded
    model.train()
    generate(model, tokenizer, "Say 3.", sampling=SHORT)
    assert model.training
    model.eval()
    generate(model, tokenizer, "Say 3.", sampling=SHORT)
    assert not model.training


def test_the_space_before_the_first_word_is_kept(loaded):
    """A raw continuation is to be put behind the prompt as it is."""
    model, tokenizer = loaded
    space = tokenizer(" fox", add_special_tokens=False)["input_ids"]
    answers = iter([*space, tokenizer.eos_token_id])

    def say(*_: object) -> torch.Tensor:
        forced = torch.full((1, model.config.vocab_size), -1e4)
        forced[..., next(answers)] = 1e4
        return forced

    hook = model.lm_head.register_forward_hook(say)
    try:
        assert generate(model, tokenizer, "The quick brown", raw=True, sampling=SHORT) == " fox"
    finally:
        hook.remove()


def test_a_trained_adapter_answers_as_it_was_taught(trained):
    model, tokenizer = load(trained, device="cpu")
    assert generate(model, tokenizer, "Say 5.", sampling=SHORT).startswith("Here is")


@pytest.mark.parametrize("is_adapter", [False, True], ids=["full model", "adapter"])
def test_greedy_is_greedy_whatever_the_checkpoint_asks_for(small_model, trained, tmp_path, is_adapter):
    """Penalties in generation_config.json would forbid the words that the prompt and the training taught."""
    folder = shutil.copytree(small_model, tmp_path / "model")
    file = folder / "generation_config.json"
    penalties = {"repetition_penalty": 8.0, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "num_beams": 2}
    file.write_text(json.dumps(json.loads(file.read_text()) | penalties))
    plain, insistent = small_model, folder
    if is_adapter:
        plain, insistent = trained, shutil.copytree(trained, tmp_path / "adapter")
        settings = json.loads((insistent / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(folder)
        (insistent / "adapter_config.json").write_text(json.dumps(settings))
    model, tokenizer = load(insistent, device="cpu")
    sampling = Sampling(max_new_tokens=40)
    expected = Engine(*load(plain, device="cpu")).generate(PROMPTS, sampling)
    assert Engine(model, tokenizer).generate(PROMPTS, sampling) == expected
    kept = [model.generation_config, *([model.get_base_model().generation_config] if is_adapter else [])]
    assert {(config.repetition_penalty, config.no_repeat_ngram_size) for config in kept} == {(8.0, 2)}


def test_room_in_the_context(loaded):
    model, tokenizer = loaded
    with pytest.raises(UserError, match="256"):
        generate(model, tokenizer, "1 " * 200, raw=True)
    with pytest.raises(UserError, match=r"\(max_new_tokens\) exceed"):
        generate(model, tokenizer, "Say 3.", sampling=Sampling(max_new_tokens=255))


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"seed": -1},
    ],
    ids=str,
)
def test_a_sampling_that_cannot_be_meant(values):
    with pytest.raises(UserError, match=f"^{next(iter(values))} is"):
        Sampling(**values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"running": -1}, "running is -1; expected a whole number from 1 on"),
        ({"running": 0}, "running is 0"),
        ({"cache_bytes": 1e8}, r"cache_bytes is 100000000\.0"),
    ],
)
def test_sizes_that_are_none(loaded, options, words):
    with pytest.raises(UserError, match=words):
        Engine(*loaded, **options)


def test_prompts_that_are_none(loaded):
    engine = Engine(*loaded)
    with pytest.raises(UserError, match="prompts is one text; expected a list"):
        engine.generate("Hi")
    with pytest.raises(UserError, match="contains a lone surrogate"):
        engine.generate(["caf\udce9"])
    with pytest.raises(UserError, match="contains a lone surrogate"):
        engine.generate(["Hi"], system="caf\udce9")
    with pytest.raises(UserError, match="has no token of its own"):
        engine.score([("Say", "")])


def test_more_candidates_than_the_vocabulary_has(loaded):
    options = {"max_new_tokens": 4, "temperature": 1.0, "seed": 3}
    all_of_them = loaded[0].config.vocab_size
    answers = [Engine(*loaded).generate(PROMPTS, Sampling(**options, top_k=k)) for k in (all_of_them, 2**63)]
    assert answers[0] == answers[1]
