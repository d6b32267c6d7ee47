"""The engine answers and scores as stock transformers does, whatever else runs at the same time."""

import json
import math
from collections import Counter
from contextlib import nullcontext
from itertools import zip_longest
from random import Random

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fettle.adapters.lora import adapt, attach
from fettle.engine import torch_engine
from fettle.engine.pages import PAGE_SIZE
from fettle.engine.request import Request, Sampling, ScoreRequest
from fettle.engine.runner import cache_bytes_per_token
from fettle.engine.torch_engine import TorchEngine
from fettle.errors import ModelFault, UserError
from fettle.models.decoder import causal_lm_class

BORDER = 64
"""LongRoPE's original context in these tests."""

COMMON = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "mistral": MistralConfig(**COMMON, sliding_window=24),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "gemma2": Gemma2Config(**COMMON, head_dim=16, sliding_window=20, query_pre_attn_scalar=16),
    "phi3": Phi3Config(
        **{**COMMON, "num_key_value_heads": 4},
        original_max_position_embeddings=BORDER,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + 0.7 * i for i in range(8)],
        },
    ),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

pytestmark = pytest.mark.filterwarnings("ignore")


def stock_and_ours(family, device="cpu"):
    """A random stock model in fp32 and fettle's with the same weights, spread enough that no two logits are close."""
    torch.manual_seed(1)
    config = CONFIGS[family]
    attention = "eager" if family == "gemma2" else "sdpa"
    stock = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in stock.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    ours = causal_lm_class(family)(config)
    ours.load_state_dict(stock.state_dict())
    return stock.eval().to(device), ours.eval().to(device)


def expected(stock, prompt, new):
    ids = torch.tensor([prompt], device=stock.device)
    # without a cache: releases of transformers before 5.20 keep the wrong one at LongRoPE's border
    output = stock.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0, use_cache=False)
    return output[0, len(prompt) :].tolist()


def prompts_of(count, seed=0):
    """Prompts shorter and longer than a page, a window and LongRoPE's border; the last two share a prefix."""
    random = Random(seed)
    sizes = [1, 3, 15, 16, 17, 40, 60, 63, 64, 65, 100]
    prompts = [[random.randrange(1, 320) for _ in range(random.choice(sizes))] for _ in range(count - 2)]
    shared = [random.randrange(1, 320) for _ in range(50)]
    return [*prompts, [*shared, 7], [*shared, 8, 9]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_answers_are_those_of_stock_generate(family, device):
    stock, ours = stock_and_ours(family, device)
    prompts, random = prompts_of(14), Random(1)
    news = [random.randrange(1, 40) for _ in prompts]
    wanted = [expected(stock, *pair) for pair in zip(prompts, news, strict=True)]
    requests = [
        Request(tokens=p, sampling=Sampling(max_new_tokens=n)) for p, n in zip(prompts, news, strict=True)
    ]
    together = TorchEngine(ours, running=6)
    assert [answer.tokens for answer in together.generate(requests)] == wanted
    assert [answer.tokens for answer in together.generate(requests)] == wanted, "with prefixes in the cache"
    # so few pages that sequences lose theirs and are computed again
    small = TorchEngine(ours, running=6, cache_bytes=12 * PAGE_SIZE * cache_bytes_per_token(ours))
    assert [answer.tokens for answer in small.generate(requests)] == wanted
    for engine in (together, small):
        assert engine._scheduler.pool.free == engine._scheduler.pool.pages, "every page is given back"


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_many_random_requests(family):
    """They arrive while others run, are cancelled at random, share beginnings, and find too few pages."""
    stock, ours = stock_and_ours(family)
    random = Random(family)
    beginnings = [[random.randrange(1, 320) for _ in range(random.randrange(1, 90))] for _ in range(6)]
    engine = TorchEngine(ours, running=9, cache_bytes=20 * PAGE_SIZE * cache_bytes_per_token(ours))
    left, asked, answers = 150, {}, {}
    while left or engine._sequences:
        if left and random.random() < 0.4:
            beginning = random.choice([[], *beginnings])
            prompt = [*beginning, *(random.randrange(1, 320) for _ in range(random.randrange(1, 40)))]
            new = random.randrange(1, 30)
            number = engine.submit(Request(tokens=prompt, sampling=Sampling(max_new_tokens=new)))
            asked[number], answers[number], left = (prompt, new), [], left - 1
        elif asked and random.random() < 0.02:
            number = random.choice(list(engine._sequences) or [-1])
            engine.cancel(number)
            asked.pop(number, None)
        for event in engine.step():
            answers[event.request].append(event.token)
    assert engine._scheduler.pool.free == engine._scheduler.pool.pages
    assert len(asked) > 120
    for number, (prompt, new) in asked.items():
        assert answers[number] == expected(stock, prompt, new)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_scores_are_those_of_a_forward_pass(family):
    stock, ours = stock_and_ours(family)
    engine, texts = TorchEngine(ours), [p for p in prompts_of(10, seed=2) if len(p) > 1]
    requests = [ScoreRequest(tokens=p, positions=range(max(1, len(p) // 2), len(p))) for p in texts]
    kept = {}
    for _ in range(2):  # the second time with prefixes in the cache
        found = engine.score(requests, lambda number, log_probs: kept.__setitem__(number, log_probs))
        for number, (request, scores) in enumerate(zip(requests, found, strict=True)):
            with torch.no_grad():
                logits = stock(torch.tensor([list(request.tokens)])).logits[0].log_softmax(-1)
            at = [position - 1 for position in request.positions]
            labels = [request.tokens[position] for position in request.positions]
            torch.testing.assert_close(scores.log_probs, logits[at, labels], atol=1e-4, rtol=0)
            torch.testing.assert_close(kept[number], logits[at], atol=1e-4, rtol=0)
            assert scores.top.tolist() == logits[at].argmax(-1).tolist()


def test_log_probabilities_of_new_tokens():
    stock, ours = stock_and_ours("llama")
    prompt = prompts_of(3)[0]
    request = Request(tokens=prompt, sampling=Sampling(max_new_tokens=8), log_probs=True)
    (answer,) = TorchEngine(ours).generate([request])
    whole = [*prompt, *answer.tokens]
    with torch.no_grad():
        log_probs = stock(torch.tensor([whole])).logits[0].log_softmax(-1)
    wanted = [log_probs[len(prompt) + n - 1, token] for n, token in enumerate(answer.tokens)]
    torch.testing.assert_close(torch.tensor(answer.log_probs), torch.stack(wanted), atol=1e-4, rtol=0)


def test_adapters_answer_unmerged_as_their_model_does():
    _, ours = stock_and_ours("llama")
    adapted = adapt(ours, rank=4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.eval()
    prompts = prompts_of(6)
    wanted = [expected(adapted, prompt, 12) for prompt in prompts]
    requests = [Request(tokens=prompt, sampling=Sampling(max_new_tokens=12)) for prompt in prompts]
    assert [answer.tokens for answer in TorchEngine(adapted).generate(requests)] == wanted
    with adapted.disable_adapter():
        without = TorchEngine(adapted).generate(requests)
    assert [answer.tokens for answer in without] != wanted


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two adapters for the model of `stock_and_ours("llama")`, of other ranks and on other layers.

    "b" is rank-stabilized.
    """
    folder = tmp_path_factory.mktemp("adapters")
    for name, rank, targets in (("a", 4, "all-linear"), ("b", 3, ["q_proj", "v_proj"])):
        adapted = adapt(
            stock_and_ours("llama")[1], rank=rank, target_modules=targets, alpha=5, use_rslora=name == "b"
        )
        torch.manual_seed(rank)
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        save_adapter(adapted, folder / name)
    return folder


def save_adapter(adapted, folder):
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained(folder)


@pytest.mark.parametrize("device", DEVICES)
def test_several_adapters_in_one_batch(adapters, device):
    model = attach(stock_and_ours("llama", device)[1], adapters / "a", name="a")
    model = attach(model, adapters / "b", name="b")
    prompts = prompts_of(9)
    prompts[3] = prompts[4] = prompts[6] = max(prompts, key=len)[:20]  # nothing of it is shared
    names = ["a", "b", "", None, "b", "a", "", "a", "b"]
    wanted = []
    for name, prompt in zip(names, prompts, strict=True):
        model.set_adapter(name or "a")
        with model.disable_adapter() if name == "" else nullcontext():
            wanted.append(expected(model, prompt, 10))
    model.set_adapter("a")
    assert wanted[3] != wanted[4] != wanted[6]
    requests = [
        Request(tokens=prompt, sampling=Sampling(max_new_tokens=10), adapter=name)
        for name, prompt in zip(names, prompts, strict=True)
    ]
    engine = TorchEngine(model, running=4)
    assert [answer.tokens for answer in engine.generate(requests)] == wanted
    text = prompts[3]
    scores = engine.score(
        [ScoreRequest(tokens=text, positions=[9], adapter=name) for name in ("a", "b", "a")]
    )
    assert scores[0].log_probs != scores[1].log_probs and scores[0].log_probs == scores[2].log_probs

    # the active adapter is switched, and then trained: what the engine has kept of it is not used again
    request = Request(tokens=text * 3, sampling=Sampling(max_new_tokens=10))
    first = engine.generate([request])[0].tokens
    model.set_adapter("b")
    second = engine.generate([request])[0].tokens
    trained = [parameter for key, parameter in model.named_parameters() if ".b." in key]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(trained, lr=0.5, fused=True).step()  # which does not raise a tensor's _version
    third = engine.generate([request])[0].tokens
    assert len({tuple(tokens) for tokens in (first, second, third)}) == 3
    assert third == expected(model, text * 3, 10)


def test_adapters_on_other_layers(adapters):
    """Neither the first nor any other layer has both."""
    save_adapter(adapt(stock_and_ours("llama")[1], target_modules=["down_proj"]), adapters / "down")
    for names in (["b", "down"], ["down", "b"]):
        model = stock_and_ours("llama")[1]
        for name in names:
            model = attach(model, adapters / name, name=name)
        requests = [
            Request(tokens=[5, 6, 7], sampling=Sampling(max_new_tokens=6), adapter=name)
            for name in (*names, None)
        ]
        wanted = []
        for name in (*names, names[0]):
            model.set_adapter(name)
            wanted.append(expected(model, [5, 6, 7], 6))
        model.set_adapter(names[0])
        assert [answer.tokens for answer in TorchEngine(model).generate(requests)] == wanted


def test_an_adapter_brings_the_context_it_was_trained_for(tmp_path):
    for name, context in (("long", 200), ("short", None)):
        save_adapter(adapt(stock_and_ours("phi3")[1]), tmp_path / name)
        facts = {"base_fingerprint": "x", "quantization": None, "context_tokens": context}
        (tmp_path / name / "fettle.json").write_text(json.dumps(facts))
    model = attach(stock_and_ours("phi3")[1], tmp_path / "long")
    assert model.get_base_model().model.rotary_emb.context_tokens == 200
    with pytest.raises(UserError, match=r"trained for a context of None tokens, .* one of 200"):
        attach(model, tmp_path / "short", name="other")


def test_streams_and_jobs_take_turns():
    """Each gets its own tokens, whoever computes the step."""
    _, ours = stock_and_ours("llama")
    prompts = prompts_of(6)
    requests = [Request(tokens=p, sampling=Sampling(max_new_tokens=5 + 3 * n)) for n, p in enumerate(prompts)]
    wanted = [answer.tokens for answer in TorchEngine(ours).generate(requests)]
    engine = TorchEngine(ours)
    streams = [engine.stream(request) for request in requests[:3]]
    found = [[next(stream).token] for stream in streams]
    assert [answer.tokens for answer in engine.generate(requests[3:])] == wanted[3:]
    text = prompts[0] * 3
    scored = [ScoreRequest(tokens=text, positions=[len(text) - 1])]
    (scores,) = engine.score(scored)
    for events in zip_longest(*streams):
        for number, event in enumerate(events):
            found[number] += [] if event is None else [event.token]
    assert found == wanted[:3]
    assert torch.equal(scores.log_probs, TorchEngine(ours).score(scored)[0].log_probs)
    assert not engine._undelivered


def test_adapters_that_cannot_be_used(adapters):
    _, ours = stock_and_ours("llama")
    with pytest.raises(UserError, match="has no adapter 'a'; it has none"):
        TorchEngine(ours).submit(Request(tokens=[1], adapter="a"))
    model = attach(ours, adapters / "a", name="a")
    with pytest.raises(UserError, match="has no adapter 'c'; it has a"):
        TorchEngine(model).submit(Request(tokens=[1], adapter="c"))
    with pytest.raises(UserError, match="already has an adapter 'a'"):
        attach(model, adapters / "b", name="a")
    save_adapter(adapt(stock_and_ours("phi3")[1]), adapters / "other")
    with pytest.raises(UserError, match="belongs to another model"):
        attach(model, adapters / "other", name="c")
    assert list(model.peft_config) == ["a"]
    with pytest.raises(UserError, match=r"'v1\.5' cannot be the name of an adapter"):
        attach(model, adapters / "b", name="v1.5")
    model.add_adapter("dora", LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="'dora' is more than plain LoRA"):
        TorchEngine(model).submit(Request(tokens=[1], adapter="a"))


def test_an_adapter_of_another_kind_than_lora_runs_by_itself():
    _, ours = stock_and_ours("llama")
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapted = get_peft_model(ours, config).eval()
    for name, parameter in adapted.named_parameters():
        if "ia3_l" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    prompt = prompts_of(3)[0]
    request = Request(tokens=prompt, sampling=Sampling(max_new_tokens=8))
    assert TorchEngine(adapted).generate([request])[0].tokens == expected(adapted, prompt, 8)
    with pytest.raises(UserError, match="more than plain LoRA"):
        TorchEngine(adapted).submit(Request(tokens=prompt, adapter="default"))


SAMPLED = Sampling(max_new_tokens=12, temperature=1.5, top_k=40, top_p=0.95, seed=3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_gives_the_same_answer_whatever_else_runs(device):
    _, ours = stock_and_ours("llama", device)
    prompts = prompts_of(8)
    request = Request(tokens=prompts[0], sampling=SAMPLED)
    others = [
        Request(tokens=p, sampling=Sampling(max_new_tokens=9, temperature=0.8, min_p=0.1))
        for p in prompts[1:]
    ]
    (alone,) = TorchEngine(ours).generate([request])
    among = TorchEngine(ours, running=3).generate([*others[:4], request, *others[4:]])[4]
    small = TorchEngine(ours, running=4, cache_bytes=12 * PAGE_SIZE * cache_bytes_per_token(ours))
    preempted = small.generate([*others[:4], request, *others[4:]])[4]
    assert alone.tokens == among.tokens == preempted.tokens
    (other,) = TorchEngine(ours).generate(
        [Request(tokens=prompts[0], sampling=Sampling(seed=4, temperature=1.5))]
    )
    assert other.tokens[:12] != alone.tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 6, "top_p": 0.8, "min_p": 0.05}],
    ids=str,
)
def test_samples_follow_the_filtered_distribution(options):
    """A chi-square test against transformers' own filters, 3,000 first tokens after one prompt."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    stock, ours = stock_and_ours("llama")
    prompt, draws, temperature = [5, 6, 7], 3000, 3.0
    filters = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    for name, warper in (
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in options:
            filters.append(warper(options[name]))
    ids = torch.tensor([prompt])
    with torch.no_grad():
        probabilities = filters(ids, stock(ids).logits[:, -1])[0].softmax(-1)
    requests = [
        Request(
            tokens=prompt,
            sampling=Sampling(max_new_tokens=1, temperature=temperature, seed=seed, **options),
        )
        for seed in range(draws)
    ]
    counts = Counter(answer.tokens[0] for answer in TorchEngine(ours).generate(requests))
    assert all(probabilities[token] > 0 for token in counts)
    # tokens that are expected fewer than five times form one class together
    often = [token for token in range(320) if draws * probabilities[token] >= 5]
    rare = draws * (1 - float(probabilities[often].sum()))
    found = [counts[token] for token in often] + [draws - sum(counts[token] for token in often)]
    wanted = [draws * float(probabilities[token]) for token in often] + [rare]
    classes = [(f, w) for f, w in zip(found, wanted, strict=True) if w > 1e-3]
    statistic = sum((f - w) ** 2 / w for f, w in classes)
    freedom = len(classes) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


def test_penalties_are_those_of_transformers():
    stock, ours = stock_and_ours("llama")
    prompt = prompts_of(4)[-1]
    ids = torch.tensor([prompt])
    output = stock.generate(
        ids, max_new_tokens=20, do_sample=False, pad_token_id=0, repetition_penalty=1.7,
        sequence_bias=[[[9], 4.0]],
    )  # fmt: skip
    sampling = Sampling(max_new_tokens=20, repetition_penalty=1.7, logit_bias={9: 4.0})
    (answer,) = TorchEngine(ours).generate([Request(tokens=prompt, sampling=sampling)])
    assert answer.tokens == output[0, len(prompt) :].tolist()
    often = TorchEngine(ours).generate(
        [Request(tokens=prompt, sampling=Sampling(max_new_tokens=20, presence_penalty=1e4))]
    )[0]
    assert len(set(often.tokens)) == 20, "no token of the answer comes twice"


def test_an_answer_ends_at_a_stop_token_and_leaves_the_others_running():
    stock, ours = stock_and_ours("qwen2")
    prompts = prompts_of(5)
    wanted = [expected(stock, prompt, 20) for prompt in prompts]
    stop = wanted[0][3]
    requests = [
        Request(tokens=p, sampling=Sampling(max_new_tokens=20), stops=frozenset([stop])) for p in prompts
    ]
    for answer, tokens in zip(TorchEngine(ours).generate(requests), wanted, strict=True):
        end = tokens.index(stop) + 1 if stop in tokens else 20
        assert answer.tokens == tokens[:end]
        assert answer.finish == ("stop" if stop in tokens else "length")


def test_a_shared_prefix_is_computed_once():
    _, ours = stock_and_ours("llama")
    engine, seen = TorchEngine(ours), []
    run = engine._runner.prefill
    engine._runner.prefill = lambda chunks: (seen.append(sum(c.end - c.begin for c in chunks)), run(chunks))[
        1
    ]
    prefix = [Random(3).randrange(1, 320) for _ in range(6 * PAGE_SIZE)]
    requests = [ScoreRequest(tokens=[*prefix, n, n + 1], positions=[len(prefix) + 1]) for n in range(20)]
    engine.score(requests)
    assert sum(seen) == len(prefix) + 20 * 2


def test_streams_and_cancelled_requests_give_their_pages_back():
    stock, ours = stock_and_ours("llama")
    engine, prompt = TorchEngine(ours), prompts_of(3)[1]
    stream = engine.stream(Request(tokens=prompt, sampling=Sampling(max_new_tokens=30)))
    first = [next(stream).token for _ in range(5)]
    stream.close()
    assert first == expected(stock, prompt, 5)
    number = engine.submit(Request(tokens=prompt))
    engine.cancel(number)
    assert engine.step() == []
    assert engine._scheduler.pool.free == engine._scheduler.pool.pages


def test_an_interrupted_batch_leaves_the_engine_usable():
    stock, ours = stock_and_ours("llama")
    engine, prompts = TorchEngine(ours), prompts_of(5)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    requests = [Request(tokens=p, sampling=Sampling(max_new_tokens=6)) for p in prompts]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, interrupt)
    assert engine._scheduler.pool.free == engine._scheduler.pool.pages
    wanted = [expected(stock, prompt, 6) for prompt in prompts]
    assert [answer.tokens for answer in engine.generate(requests)] == wanted


def test_requests_that_can_never_run_are_refused_before_any_runs():
    _, ours = stock_and_ours("llama")
    engine = TorchEngine(ours, cache_bytes=4 * PAGE_SIZE * cache_bytes_per_token(ours))
    fine = Request(tokens=[1, 2], sampling=Sampling(max_new_tokens=2))
    for request, words in (
        (Request(tokens=[]), "no tokens"),
        (Request(tokens=[1] * 300), "context of 256 tokens"),
        (Request(tokens=[320]), "ids from 0 to 319"),
        (Request(tokens=[-1]), "ids from 0 to 319"),
        (Request(tokens=[1] * 60, sampling=Sampling(max_new_tokens=40)), "holds 64 tokens.* needs 112"),
    ):
        with pytest.raises(UserError, match=words):
            engine.generate([fine, request])
    assert engine._scheduler.pool.free == 4
    with pytest.raises(UserError, match="holds no tokens"):
        TorchEngine(ours, cache_bytes=10)
    assert engine.generate([]) == []


def test_damaged_weights_are_named():
    _, ours = stock_and_ours("llama")
    ours.lm_head.weight.data[3] = math.nan
    engine = TorchEngine(ours)
    for run in (
        lambda: engine.generate([Request(tokens=[1, 2, 3])]),
        lambda: engine.score([ScoreRequest(tokens=[1, 2, 3], positions=[2])]),
    ):
        with pytest.raises(ModelFault, match="NaN or Inf"):
            run()


def test_the_cache_takes_what_the_process_may_have(monkeypatch):
    """The free memory is the machine's; a limit of the process or its container is found by trying."""
    stock, ours = stock_and_ours("llama")
    make, asked = torch_engine.make_cache, []

    def limited(model, pages):
        asked.append(pages)
        if pages > 40:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return make(model, pages)

    monkeypatch.setattr(torch_engine, "make_cache", limited)
    engine, prompt = TorchEngine(ours), prompts_of(3)[0]
    assert len(asked) > 1 and 20 <= asked[-1] <= 40
    (answer,) = engine.generate([Request(tokens=prompt, sampling=Sampling(max_new_tokens=5))])
    assert answer.tokens == expected(stock, prompt, 5)
