"""Documents that share their first tokens, against the same documents with a copy of these tokens each."""

import pytest
import torch

from fettle.ops.attention import Documents, KeptAttention, packed_attention, packed_attention_reference

# groups of: shared tokens, further tokens of the root, tokens of each document that continues the shared ones
GROUPS = {
    "a pair": [(7, 5, [4])],
    "several answers": [(40, 3, [9, 1, 17])],
    "an answer of one token": [(1, 1, [1])],
    "a root that is all prompt": [(12, 0, [5, 6])],
    "packed with other documents": [(3, 8, []), (20, 4, [6, 2]), (5, 0, []), (9, 2, [30])],
    "long": [(300, 200, [180, 90]), (33, 10, [600])],
}
HEADS = {"grouped": (4, 2, 6), "one each": (3, 3, 8)}


class Layout:
    """Where the documents of `groups` are in a shared pack, and in a pack with a copy of every prompt."""

    def __init__(self, groups: list[tuple[int, int, list[int]]]) -> None:
        self.copies: list[int] = []
        """Of each token of the unshared pack, its place in the shared one."""
        starts, shared, unshared, place = [], [], [], 0
        for prefix, rest, others in groups:
            root = place
            for number, length in enumerate([prefix + rest, *(prefix + n for n in others)]):
                unshared.append(len(self.copies))
                own = length if number == 0 else length - prefix
                starts.append(place)
                shared.append(0 if number == 0 else prefix)
                self.copies += [*range(root, root + length - own), *range(place, place + own)]
                place += own
        self.tokens = place
        self.marks = marks(starts, place), marks(starts, place, shared), marks(unshared, len(self.copies))
        self.documents = Documents.from_starts(*self.marks[:2])
        self.unshared = Documents.from_starts(self.marks[2])


def marks(starts: list[int], tokens: int, values: list[int] | None = None) -> torch.Tensor:
    if values is None:
        return torch.zeros(tokens, dtype=torch.bool).index_fill(0, torch.tensor(starts), True)
    return torch.zeros(tokens, dtype=torch.long).index_copy(0, torch.tensor(starts), torch.tensor(values))


def inputs(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    query, shared, channels = heads
    return [torch.randn(tokens, n, channels, dtype=dtype).requires_grad_() for n in (query, shared, shared)]


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_values_and_gradients_equal_those_without_sharing(
    groups: list, heads: tuple[int, int, int], softcap: float | None
) -> None:
    layout = Layout(groups)
    parts = inputs(layout.tokens, heads, torch.float64)
    rules = {"scale": 0.4, "softcap": softcap}
    copied = [part[layout.copies] for part in parts]
    expected = packed_attention(*copied, layout.unshared, **rules)
    found = packed_attention(*parts, layout.documents, **rules)
    torch.testing.assert_close(found[layout.copies], expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(expected)
    # a shared token's result counts once for every copy
    summed = torch.zeros_like(found).index_add(0, torch.tensor(layout.copies), grad)
    theirs = torch.autograd.grad(expected, parts, grad)
    for mine, other in zip(torch.autograd.grad(found, parts, summed), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_reference_says_the_same(groups: list) -> None:
    layout = Layout(groups)
    parts = inputs(layout.tokens, (2, 1, 4), torch.float64)
    expected = packed_attention_reference(*parts, layout.documents, scale=0.4)
    torch.testing.assert_close(packed_attention(*parts, layout.documents, scale=0.4), expected)


def test_a_window_as_long_as_every_row_hides_nothing_that_is_shared() -> None:
    """The group, a prompt with two answers, is longer than the window; each row is not."""
    layout = Layout([(6, 6, [6]), (3, 9, [7])])
    parts = inputs(layout.tokens, (2, 1, 4), torch.float64)
    whole = packed_attention(*parts, layout.documents, scale=0.4)
    for attend in (packed_attention, packed_attention_reference):
        torch.testing.assert_close(attend(*parts, layout.documents, scale=0.4, window=12), whole)


def test_bf16_is_as_exact_as_without_sharing() -> None:
    layout = Layout(GROUPS["long"])
    parts = inputs(layout.tokens, (4, 2, 32), torch.float64)
    exact = packed_attention(*parts, layout.documents, scale=0.2)
    rounded = [part.detach().bfloat16().requires_grad_() for part in parts]
    shared = packed_attention(*rounded, layout.documents, scale=0.2)
    copied = packed_attention(*(part[layout.copies] for part in rounded), layout.unshared, scale=0.2)
    error = (shared.double() - exact).norm()
    other = (copied.double() - exact[layout.copies]).norm()
    assert error / exact.norm() < 1.2 * other / exact[layout.copies].norm() + 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["flash", "triton"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_a_gpu_is_as_exact_as_without_sharing(groups: list, softcap: float | None) -> None:
    layout, rules = Layout(groups), {"scale": 0.2, "softcap": softcap}
    exact = inputs(layout.tokens, (4, 2, 64), torch.float64)
    copied = packed_attention(*(part[layout.copies] for part in exact), layout.unshared, **rules)
    grad = torch.randn_like(copied)
    expected = [copied, *torch.autograd.grad(copied, exact, grad)]
    cuda = [part.detach().bfloat16().cuda().requires_grad_() for part in exact]
    on_gpu = [
        Documents.from_starts(layout.marks[0].cuda(), layout.marks[1].cuda()),
        Documents.from_starts(layout.marks[2].cuda()),
    ]
    copies = torch.tensor(layout.copies).cuda()
    found = packed_attention(*cuda, on_gpu[0], **rules)
    summed = torch.zeros_like(found).index_add(0, copies, grad.cuda().bfloat16())
    shared = [found[copies], *torch.autograd.grad(found, cuda, summed)]
    alone = packed_attention(*(part[copies] for part in cuda), on_gpu[1], **rules)
    unshared = [alone, *torch.autograd.grad(alone, cuda, grad.cuda().bfloat16())]
    for mine, other, right in zip(shared, unshared, expected, strict=True):
        errors = [float((each.cpu().double() - right).norm() / right.norm()) for each in (mine, other)]
        assert errors[0] < 1.5 * errors[1] + 2e-3


def test_a_recomputed_layer_uses_the_merged_result() -> None:
    layout, kept = Layout(GROUPS["several answers"]), KeptAttention()
    parts = inputs(layout.tokens, (2, 2, 4), torch.float32)
    first = packed_attention(*parts, layout.documents, scale=0.4, kept=kept)
    again = packed_attention(*parts, layout.documents, scale=0.4, kept=kept)
    grads = [torch.autograd.grad(each.square().sum(), parts) for each in (first, again)]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_lengths_count_the_shared_tokens() -> None:
    documents = Layout([(3, 2, [1])]).documents
    assert documents.lengths.tolist() == [5] * 5 + [4]


@pytest.mark.parametrize(
    ("starts", "shared"),
    [([0, 4], [2, 0]), ([0, 2], [0, 3]), ([0, 5, 7], [0, 3, 4])],
    ids=["no root", "longer than its root", "two prefixes of one root"],
)
def test_a_document_without_a_fitting_root_is_refused(starts: list[int], shared: list[int]) -> None:
    with pytest.raises(ValueError, match="must follow it"):
        Documents.from_starts(marks(starts, 9), marks(starts, 9, shared))
