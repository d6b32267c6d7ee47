"""Packed rows: every document gives what it gives alone, here and in stock transformers.

The lengths are odd on purpose, and some documents are longer than every sliding window.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

LOGITS = 2e-5  # absolute, fp32
GRADIENT = 1e-4  # relative to the gradient's norm

# Two rows of 106 tokens: single tokens, lengths beside powers of two, documents longer than every window.
ROWS = [[33, 1, 7, 2, 63], [63, 2, 1, 1, 39]]
WHOLE = [[106], [33, 1, 7, 2, 63]]
"""A row that is one document beside a row of several."""

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")


@pytest.fixture
def tokens() -> torch.Tensor:
    """(2, 106) token numbers."""
    return torch.randint(3, 97, (2, 106), generator=torch.Generator().manual_seed(3))


def positions_of(rows: list[list[int]]) -> torch.Tensor:
    """(rows, tokens) positions that restart with every document."""
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


def documents_of(x: torch.Tensor, rows: list[list[int]]) -> list[torch.Tensor]:
    """x: (rows, tokens, ...), cut into documents of (1, tokens, ...)."""
    return [part for row, lengths in zip(x, rows, strict=True) for part in row[None].split(lengths, dim=1)]


def assert_each_as_alone(
    model: PreTrainedModel, logits: torch.Tensor, tokens: torch.Tensor, rows: list[list[int]]
) -> None:
    """`logits` of packed `rows` against what `model` says of each document by itself."""
    for found, document in zip(documents_of(logits, rows), documents_of(tokens, rows), strict=True):
        expected = model(document, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS)


# --- equal to alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, WHOLE], ids=["several", "one-and-several"])
@torch.no_grad()
def test_packed_equals_alone(pair: Any, tokens: torch.Tensor, rows: list[list[int]]) -> None:
    packed = pair.ours(tokens, position_ids=positions_of(rows)).logits
    assert_each_as_alone(pair.ours, packed, tokens, rows)
    assert_each_as_alone(pair.stock, packed, tokens, rows)


@torch.no_grad()
def test_a_mask_of_ones_changes_nothing(pair: Any, tokens: torch.Tensor) -> None:
    positions = positions_of(ROWS)
    expected = pair.ours(tokens, position_ids=positions).logits
    found = pair.ours(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("pad_position", ["restarts", "runs on"])
@torch.no_grad()
def test_padding_after_the_last_document(pair: Any, tokens: torch.Tensor, pad_position: str) -> None:
    rows = [[33, 1, 7, 2, 50], [63, 2, 20]]
    real = torch.tensor([93, 85])
    mask = (torch.arange(106) < real[:, None]).long()
    filled = [[*lengths, 106 - sum(lengths)] for lengths in rows]
    positions = positions_of(filled)
    if pad_position == "runs on":
        positions = positions_of([[*r[:-2], r[-2] + r[-1]] for r in filled])
    logits = pair.ours(tokens, position_ids=positions, attention_mask=mask).logits
    for row, (lengths, n) in enumerate(zip(rows, real.tolist(), strict=True)):
        assert_each_as_alone(pair.ours, logits[row, None, :n], tokens[row, None, :n], [lengths])


@torch.no_grad()
def test_padding_before_and_between_documents(plain_pair: Any, tokens: torch.Tensor) -> None:
    mask = torch.ones(2, 106, dtype=torch.long)
    mask[:, :3] = mask[:, 36:40] = 0
    rows = [[3, 33, 4, 66], [3, 33, 4, 66]]
    positions = positions_of(rows).masked_fill(mask == 0, 0)
    packed = plain_pair.ours(tokens, position_ids=positions, attention_mask=mask).logits
    for part in (slice(3, 36), slice(40, 106)):
        expected = plain_pair.ours(tokens[:, part]).logits
        torch.testing.assert_close(packed[:, part], expected, rtol=0, atol=LOGITS)


@torch.no_grad()
def test_one_row_of_positions_serves_every_row(plain_pair: Any, tokens: torch.Tensor) -> None:
    positions = positions_of(ROWS[:1])
    expected = plain_pair.ours(tokens, position_ids=positions.expand(2, -1)).logits
    assert torch.equal(plain_pair.ours(tokens, position_ids=positions).logits, expected)


@torch.no_grad()
def test_embeddings_in_place_of_tokens(plain_pair: Any, tokens: torch.Tensor) -> None:
    ours, positions = plain_pair.ours, positions_of(ROWS)
    scale = 32**0.5 if ours.family.has_scaled_embedding else 1.0
    embeddings = ours.get_input_embeddings()(tokens) * scale
    packed = ours(inputs_embeds=embeddings, position_ids=positions).logits
    torch.testing.assert_close(packed, ours(tokens, position_ids=positions).logits, rtol=0, atol=LOGITS)


@torch.no_grad()
def test_positions_may_start_anywhere(plain_pair: Any, tokens: torch.Tensor) -> None:
    """A document cut in two goes on counting; only differences of positions matter to a rotation."""
    positions = torch.cat([torch.arange(20, 53), torch.arange(73)])[None].expand(2, -1)
    packed = plain_pair.ours(tokens, position_ids=positions).logits
    assert_each_as_alone(plain_pair.ours, packed, tokens, [[33, 73]] * 2)


# --- LongRoPE ----------------------------------------------------------------------------------------------

LONGROPE_ROWS = [[16, 17, 1, 40, 32], [15, 63, 16, 12]]


@torch.no_grad()
def test_longrope_factors_go_by_each_document(longrope_pair: Any, tokens: torch.Tensor) -> None:
    """16 tokens are the longest that the short factors serve; stock would take the long ones for the pack."""
    packed = longrope_pair.ours(tokens, position_ids=positions_of(LONGROPE_ROWS)).logits
    assert_each_as_alone(longrope_pair.stock, packed, tokens, LONGROPE_ROWS)


@pytest.mark.parametrize("context", [16, 64])
@torch.no_grad()
def test_longrope_factors_fixed_by_the_context(
    longrope_pair: Any, tokens: torch.Tensor, context: int
) -> None:
    ours = longrope_pair.copy().ours
    ours.set_context(context)
    packed = ours(tokens, position_ids=positions_of(LONGROPE_ROWS)).logits
    assert_each_as_alone(ours, packed, tokens, LONGROPE_ROWS)
    is_short = torch.tensor([n <= 16 for row in LONGROPE_ROWS for n in row])
    unlike_stock = torch.tensor(
        [
            not torch.allclose(found, longrope_pair.stock(document).logits, atol=1e-3)
            for found, document in zip(
                documents_of(packed, LONGROPE_ROWS), documents_of(tokens, LONGROPE_ROWS), strict=True
            )
        ]
    )
    is_affected = (
        ~is_short if context == 16 else is_short & (torch.tensor([16, 0, 1, 0, 0, 15, 0, 16, 12]) > 1)
    )
    assert unlike_stock.tolist() == is_affected.tolist()


# --- no leak -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_changing_one_document_moves_no_other(pair: Any, tokens: torch.Tensor) -> None:
    """Not by rounding either: `rtol` is zero, and so is `atol`."""
    positions = positions_of(ROWS)
    before = documents_of(pair.ours(tokens, position_ids=positions).logits, ROWS)
    changed = tokens.clone()
    changed[0, 34:41] = (tokens[0, 34:41] + 11) % 90 + 3  # the document of 7 tokens
    after = documents_of(pair.ours(changed, position_ids=positions).logits, ROWS)
    moved = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    assert moved == [i == 2 for i in range(10)]


@pytest.mark.parametrize("with_mask", [False, True], ids=["no-mask", "mask-of-ones"])
def test_no_gradient_reaches_another_document(pair: Any, tokens: torch.Tensor, with_mask: bool) -> None:
    embeddings = pair.ours.get_input_embeddings()(tokens).detach().requires_grad_()
    mask = torch.ones_like(tokens) if with_mask else None
    logits = pair.ours(
        inputs_embeds=embeddings, position_ids=positions_of(ROWS), attention_mask=mask, use_cache=False
    ).logits
    documents_of(logits, ROWS)[4].square().sum().backward()  # row 0, the last 63 tokens
    assert embeddings.grad is not None
    reached = embeddings.grad.abs().sum(-1) > 0
    expected = torch.zeros_like(reached)
    expected[0, 43:] = True
    assert torch.equal(reached, expected)


# --- gradients ---------------------------------------------------------------------------------------------


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def summed_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of next tokens within one document; zero for a single token."""
    return cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gradients_are_the_sum_of_those_alone(pair: Any, tokens: torch.Tensor, checkpointing: bool) -> None:
    stock, ours = pair.copy().both
    documents = documents_of(tokens, ROWS)
    for document in documents:
        summed_loss(stock.train()(document, use_cache=False).logits, document).backward()
    if checkpointing:
        ours.gradient_checkpointing_enable()
    packed = ours.train()(tokens, position_ids=positions_of(ROWS), use_cache=False).logits
    torch.stack(
        [summed_loss(*each) for each in zip(documents_of(packed, ROWS), documents, strict=True)]
    ).sum().backward()
    expected, found = gradients(stock), gradients(ours)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < GRADIENT, f"{name}: {error:.1e}"


def test_a_loss_on_labels_counts_every_document(plain_pair: Any, tokens: torch.Tensor) -> None:
    """Labels as TRL packs them: no document's first token is to be predicted from the document before."""
    positions = positions_of(ROWS)
    labels = tokens.masked_fill(positions == 0, -100)
    loss = plain_pair.ours(tokens, position_ids=positions, labels=labels, use_cache=False).loss
    with torch.no_grad():
        alone = [
            summed_loss(plain_pair.stock(d, use_cache=False).logits, d) for d in documents_of(tokens, ROWS)
        ]
    expected = torch.stack(alone).sum() / (212 - 10)
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=LOGITS)


# --- what cannot be ----------------------------------------------------------------------------------------


def test_packed_rows_fill_no_cache(pair_of: Callable[[str], Any], tokens: torch.Tensor) -> None:
    """Keys of several documents in one cache would leak into whatever is generated next."""
    from transformers import DynamicCache

    ours = pair_of("llama").ours
    positions = positions_of(ROWS)
    assert ours(tokens, position_ids=positions, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="use_cache=False"):
        ours(tokens, position_ids=positions, past_key_values=DynamicCache(config=ours.config))
