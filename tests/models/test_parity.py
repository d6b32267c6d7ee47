"""Stock transformers is the oracle: logits, hidden states, loss, gradients and greedy generation, in fp32."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

LOGITS = 1e-5  # absolute, in fp32; logits here are of size 1 to 10
GRADIENT = 1e-4  # relative to the gradient's norm

# transformers 5.23 has a newer name for it; the versions fettle still supports do not
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")

NEW = 12  # tokens to generate
LENGTHS = (40, 23, 1)  # one row of them full, one partly padded, one nearly all padding


@pytest.fixture
def tokens() -> torch.Tensor:
    """(3, 40) token numbers, clear of the special ones."""
    return torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(1))


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float = LOGITS) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def mask_of(side: str) -> torch.Tensor:
    """(3, 40) attention mask of rows as long as LENGTHS, padded on one side."""
    steps = torch.arange(40).expand(3, -1)
    lengths = torch.tensor(LENGTHS)[:, None]
    return ((steps < lengths) if side == "right" else (steps >= 40 - lengths)).long()


def generate_positions(mask: torch.Tensor) -> torch.Tensor:
    """The position_ids that `generate` makes from a mask."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


# --- logits ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_parameter_names_and_shapes_are_the_official_ones(pair: Any) -> None:
    stock, ours = ({name: p.shape for name, p in model.named_parameters()} for model in pair.both)
    assert ours == stock


@torch.no_grad()
def test_logits(pair: Any, tokens: torch.Tensor) -> None:
    stock, ours = (model(tokens).logits for model in pair.both)
    assert stock.abs().max() > 0.5, "the oracle is too flat to tell anything"
    assert_close(ours, stock)


@pytest.mark.parametrize("with_positions", [False, True], ids=["no-positions", "generate-positions"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_padded_rows(pair: Any, tokens: torch.Tensor, side: str, with_positions: bool) -> None:
    mask = mask_of(side)
    positions = generate_positions(mask) if with_positions else None
    stock, ours = (m(tokens, attention_mask=mask, position_ids=positions).logits for m in pair.both)
    assert_close(ours[mask.bool()], stock[mask.bool()])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
@torch.no_grad()
def test_longrope_changes_factors_where_stock_does(
    longrope_pair: Any, tokens: torch.Tensor, length: int
) -> None:
    stock, ours = (model(tokens[:, :length]).logits for model in longrope_pair.both)
    assert_close(ours, stock)


@torch.no_grad()
def test_a_fixed_context_decides_longrope_for_every_length(longrope_pair: Any, tokens: torch.Tensor) -> None:
    stock, ours = longrope_pair.copy().both
    short = tokens[:, :10]
    long_positions = (
        torch.arange(10)[None] + 40 - 10
    )  # stock goes by the longest position; rotation is relative
    for context, expected in ((16, stock(short)), (17, stock(short, position_ids=long_positions))):
        ours.set_context(context)
        assert_close(ours(short).logits, expected.logits)
    ours.set_context(None)
    assert_close(ours(short).logits, stock(short).logits)


@torch.no_grad()
def test_embeddings_in_place_of_tokens(plain_pair: Any, tokens: torch.Tensor) -> None:
    stock, ours = (
        model(inputs_embeds=model.get_input_embeddings()(tokens)).logits for model in plain_pair.both
    )
    # Gemma's stock embedding scales by itself, ours in the model: what `inputs_embeds` holds is scaled there.
    scale = 32**0.5 if plain_pair.ours.family.has_scaled_embedding else 1.0
    ours = plain_pair.ours(inputs_embeds=plain_pair.ours.get_input_embeddings()(tokens) * scale).logits
    assert_close(ours, stock)


@torch.no_grad()
def test_hidden_states(plain_pair: Any, tokens: torch.Tensor) -> None:
    stock, ours = (model(tokens, output_hidden_states=True).hidden_states for model in plain_pair.both)
    assert len(ours) == len(stock)
    for found, expected in zip(ours, stock, strict=True):
        assert_close(found, expected)
    assert plain_pair.ours(tokens).hidden_states is None


@torch.no_grad()
def test_logits_of_the_last_tokens_alone(plain_pair: Any, tokens: torch.Tensor) -> None:
    for keep in (1, 5, torch.tensor([3, 17])):
        stock, ours = (model(tokens, logits_to_keep=keep).logits for model in plain_pair.both)
        assert_close(ours, stock)


@torch.no_grad()
def test_bf16_differs_from_stock_by_rounding_at_most(plain_pair: Any, tokens: torch.Tensor) -> None:
    exact = plain_pair.stock(tokens).logits
    stock, ours = (model.bfloat16()(tokens).logits.float() for model in plain_pair.copy().both)
    assert (ours - exact).norm() <= 1.1 * (stock - exact).norm()


@torch.no_grad()
def test_every_attention_implementation_gives_the_same(plain_pair: Any, tokens: torch.Tensor) -> None:
    expected = plain_pair.stock(tokens).logits
    ours = plain_pair.copy().ours
    names = ["eager"] if ours.family.has_softcap else ["eager", "sdpa"]
    for name in names:
        ours.set_attn_implementation(name)
        assert_close(ours(tokens).logits, expected)


# --- loss and gradients ------------------------------------------------------------------------------------


def loss_of(model: PreTrainedModel, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    labels = tokens.clone()
    labels[:, ::5] = -100
    loss: torch.Tensor = model(tokens, labels=labels, use_cache=False, **kwargs).loss
    return loss


@torch.no_grad()
def test_loss(plain_pair: Any, tokens: torch.Tensor) -> None:
    for kwargs in ({}, {"num_items_in_batch": 7}):
        stock, ours = (loss_of(model, tokens, **kwargs) for model in plain_pair.both)
        assert_close(ours, stock)


@pytest.mark.parametrize("name", ["phi3-dropout", "gemma2-dropout"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_dropout_drops_the_same(
    pair_of: Callable[[str], Any], tokens: torch.Tensor, name: str, checkpointing: bool
) -> None:
    """From the same random state, and only in training."""
    stock, ours = pair_of(name).copy().both
    if checkpointing:
        ours.gradient_checkpointing_enable()
    for model in (stock, ours):
        torch.manual_seed(4)
        loss = loss_of(model.train(), tokens)
        loss.backward()
    assert_same_gradients(ours, stock)
    assert abs(loss - loss_of(ours.eval(), tokens)) > 1e-3, "nothing was dropped"


def assert_same_gradients(ours: PreTrainedModel, stock: PreTrainedModel) -> None:
    expected = {name: p.grad for name, p in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < GRADIENT, f"{name}: {error:.1e}"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gradients_of_every_parameter(pair: Any, tokens: torch.Tensor, checkpointing: bool) -> None:
    stock, ours = pair.copy().both
    loss_of(stock.train(), tokens).backward()
    if checkpointing:
        ours.gradient_checkpointing_enable()
    loss_of(ours.train(), tokens).backward()
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_padded_rows(plain_pair: Any, tokens: torch.Tensor, side: str) -> None:
    mask = mask_of(side)
    labels = tokens.masked_fill(mask == 0, -100)
    stock, ours = plain_pair.copy().both
    for model in (stock, ours):
        model.train()(tokens, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    assert_same_gradients(ours, stock)


def test_checkpointing_runs_each_layer_again(pair_of: Callable[[str], Any], tokens: torch.Tensor) -> None:
    ours = pair_of("llama").copy().ours.train()
    calls: list[int] = []
    ours.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ours.gradient_checkpointing_enable()
    loss_of(ours, tokens).backward()
    assert len(calls) == 2


# --- generation --------------------------------------------------------------------------------------------


def greedy(model: PreTrainedModel, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    generated: torch.Tensor = model.generate(tokens, **settings | kwargs)
    return generated[:, tokens.shape[1] :]


def test_greedy_generation_of_left_padded_rows(pair: Any, tokens: torch.Tensor) -> None:
    """40 tokens and 12 more: far beyond every window, and beyond LongRoPE's original context."""
    stock, ours = (greedy(model, tokens, attention_mask=mask_of("left")) for model in pair.both)
    assert ours.tolist() == stock.tolist()


def test_greedy_generation_without_a_cache(plain_pair: Any, tokens: torch.Tensor) -> None:
    settings = {"attention_mask": mask_of("left"), "use_cache": False}
    stock, ours = (greedy(model, tokens, **settings) for model in plain_pair.both)
    assert ours.tolist() == stock.tolist()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_greedy_generation_across_longrope_contexts(
    longrope_pair: Any, tokens: torch.Tensor, use_cache: bool
) -> None:
    """A short prompt that grows beyond the original context: keys made with the short factors are stale."""
    remakes = "next_sequence_length" in inspect.getsource(
        type(longrope_pair.stock).prepare_inputs_for_generation
    )
    if use_cache and not remakes:
        pytest.skip("this release of transformers drops the stale keys and never makes them again")
    prompts = tokens[:, :10]
    for kwargs in ({}, {"attention_mask": torch.tensor([[0] * 4 + [1] * 6, [1] * 10, [0] * 9 + [1]])}):
        stock, ours = (greedy(model, prompts, use_cache=use_cache, **kwargs) for model in longrope_pair.both)
        assert ours.tolist() == stock.tolist()


def test_greedy_generation_with_a_fixed_context_keeps_its_cache(
    longrope_pair: Any, tokens: torch.Tensor
) -> None:
    """With the long factors from the start nothing goes stale; the cache must not change what is said."""
    ours = longrope_pair.copy().ours
    ours.set_context(64)
    calls: list[int] = []
    ours.model.embed_tokens.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape[1]))
    cached = greedy(ours, tokens[:, :10], use_cache=True)
    assert calls == [10] + [1] * (NEW - 1)
    assert cached.tolist() == greedy(ours, tokens[:, :10], use_cache=False).tolist()


def test_greedy_generation_with_a_static_cache(plain_pair: Any, tokens: torch.Tensor) -> None:
    """Its masks are made by `generate`, one for each kind of layer."""
    settings = {"attention_mask": mask_of("left"), "cache_implementation": "static", "disable_compile": True}
    stock, ours = (greedy(model, tokens, **settings) for model in plain_pair.both)
    assert ours.tolist() == stock.tolist()


def test_generation_goes_on_from_a_cache(plain_pair: Any, tokens: torch.Tensor) -> None:
    """What a chat does: the next turn is fed onto the cache of the ones before."""
    ours = plain_pair.ours
    with torch.no_grad():
        first = ours(tokens[:, :30], use_cache=True)
        rest = ours(tokens[:, 30:], past_key_values=first.past_key_values).logits
        expected = plain_pair.stock(tokens).logits[:, 30:]
    assert_close(rest, expected)


# --- what transformers, PEFT and TRL rely on ---------------------------------------------------------------


def test_a_model_is_what_the_libraries_expect(plain_pair: Any, tokens: torch.Tensor) -> None:
    stock, ours = plain_pair.both
    assert ours.base_model_prefix == "model"
    assert ours.base_model is ours.model
    assert ours.get_decoder() is ours.model
    assert ours.get_output_embeddings() is ours.lm_head
    assert type(ours).__name__ == type(stock).__name__
    assert ours.can_generate()
    assert ours.generation_config.eos_token_id == stock.generation_config.eos_token_id
    hidden = ours.model(tokens, use_cache=False).last_hidden_state
    assert hidden.shape == (3, 40, 32)
    logits = ours(tokens, return_dict=False)[0]
    assert logits.shape == (3, 40, 97)


def test_more_tokens_than_the_checkpoint_has(plain_pair: Any, tokens: torch.Tensor) -> None:
    losses = []
    for model in plain_pair.copy().both:
        torch.manual_seed(2)
        model.resize_token_embeddings(104, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[97:] = 0.1
            model.get_output_embeddings().weight[97:] = 0.1
            losses.append(loss_of(model, tokens + 7))
    assert_close(losses[1], losses[0])
