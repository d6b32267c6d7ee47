# mypy: allow-untyped-defs, allow-incomplete-defs
"""Flash attention over packed rows in Triton: time grows with the documents' squared lengths, memory with the tokens.

FlashAttention-2 (arXiv 2307.08691): a program holds one block of queries (or of keys, in the backward pass for key
and value) and loops over the visible blocks of the other side. Without atomics, so that results are reproducible.
Saved for backward: out and logsumexp.

Shapes: T tokens of all documents, H heads, K key-value heads (H a multiple of K), D channels per head, PADDED the next
power of two of D. A program's block is (QUERIES, PADDED) or (KEYS, PADDED).
"""

import torch
import triton
import triton.language as tl

from fettle.ops.shared_prefix import Prefixes

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(pointer, tokens, stride, T, D: tl.constexpr, PADDED: tl.constexpr):
    """Load (block, PADDED) of one head, zero beyond T and D."""
    channels = tl.arange(0, PADDED)
    seen = (tokens[:, None] < T) & (channels[None, :] < D)
    return tl.load(pointer + tokens[:, None].to(tl.int64) * stride + channels[None, :], mask=seen, other=0.0)


@triton.jit
def _store(pointer, tokens, stride, block, T, D: tl.constexpr, PADDED: tl.constexpr):
    channels = tl.arange(0, PADDED)
    seen = (tokens[:, None] < T) & (channels[None, :] < D)
    target = pointer + tokens[:, None].to(tl.int64) * stride + channels[None, :]
    tl.store(target, block.to(pointer.dtype.element_ty), mask=seen)


@triton.jit
def _scores(left, right, scale, SOFTCAP: tl.constexpr):
    """Return the scores (left, right): queries by keys or keys by queries."""
    scores = tl.dot(left, tl.trans(right), input_precision="ieee") * scale
    if SOFTCAP > 0:  # tanh(x) = 1 - 2 / (exp(2x) + 1)
        scores = SOFTCAP * (1 - 2 / (tl.exp2(scores * (2 * LOG2_E / SOFTCAP)) + 1))
    return scores


@triton.jit
def _visible(i, j, starts, roots, prefix_ends, T, window):
    own = (j >= starts) & (j <= i) & (j > i - window)
    return (own | ((j >= roots) & (j < prefix_ends))) & (i < T)


@triton.jit
def _score_gradient(
    left, right, left_value, right_value, logsumexp, delta, seen, scale, SOFTCAP: tl.constexpr
):
    """Return the weights and the gradient of q.k * scale, fp32 (left, right).

    The query side has q and the gradient of out, the key side k and v; either may be the left one.
    """
    scores = _scores(left, right, scale, SOFTCAP)
    # Masked before the exponential: an unseen score may be far above the row's logsumexp.
    exponent = tl.where(seen, (scores - logsumexp) * LOG2_E, float("-inf"))
    weights = tl.exp2(exponent)
    grad_weights = tl.dot(left_value, tl.trans(right_value), input_precision="ieee")
    grad_scores = weights * (grad_weights - delta)
    if SOFTCAP > 0:
        ratio = scores / SOFTCAP
        grad_scores = grad_scores * (1 - ratio * ratio)
    return weights, grad_scores


@triton.jit
def forward_kernel(
    query, key, value, starts, roots, prefix_ends, out, logsumexp, T, window, reach, scale,
    query_token, query_head, key_token, key_head, value_token, value_head, out_token, out_head,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * QUERIES
    head = tl.program_id(1)
    queries = first + tl.arange(0, QUERIES)
    own = tl.load(starts + queries, mask=queries < T, other=T)  # start of each query's document
    root = tl.load(roots + queries, mask=queries < T, other=T)
    prefix_end = tl.load(prefix_ends + queries, mask=queries < T, other=T)
    q = _load(query + head * query_head, queries, query_token, T, D, PADDED)
    # Finite, so that a row without visible keys so far gives exp2(-inf - highest) = 0 instead of NaN.
    highest = tl.full((QUERIES,), -1.0e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, PADDED), tl.float32)
    # The first query has the earliest root, so no query of the block attends to a key before `begin`.
    begin = tl.maximum(tl.load(roots + first), first - reach + 1)
    for block in range(begin, tl.minimum(first + QUERIES, T), KEYS):
        keys = block + tl.arange(0, KEYS)
        k = _load(key + head // GROUP * key_head, keys, key_token, T, D, PADDED)
        v = _load(value + head // GROUP * value_head, keys, value_token, T, D, PADDED)
        # In units of log 2, as exp2 is faster than exp.
        scores = _scores(q, k, scale, SOFTCAP) * LOG2_E
        scores = tl.where(
            _visible(
                queries[:, None], keys[None, :], own[:, None], root[:, None], prefix_end[:, None], T, window
            ),
            scores,
            float("-inf"),
        )
        # Online softmax: rescale sum and result whenever a row's maximum grows.
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher
    total = tl.where(queries < T, total, 1.0)  # rows beyond T are not stored; avoid 0 / 0 and log(0)
    _store(out + head * out_head, queries, out_token, result / total[:, None], T, D, PADDED)
    tl.store(logsumexp + head * T + queries, (highest + tl.log2(total)) / LOG2_E, mask=queries < T)


@triton.jit
def query_gradient_kernel(
    query, key, value, grad, starts, roots, prefix_ends, logsumexp, delta, grad_query, T, window, reach, scale,
    query_token, query_head, key_token, key_head, value_token, value_head, grad_token, grad_head,
    out_token, out_head,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * QUERIES
    head = tl.program_id(1)
    queries = first + tl.arange(0, QUERIES)
    own = tl.load(starts + queries, mask=queries < T, other=T)
    root = tl.load(roots + queries, mask=queries < T, other=T)
    prefix_end = tl.load(prefix_ends + queries, mask=queries < T, other=T)
    q = _load(query + head * query_head, queries, query_token, T, D, PADDED)
    g = _load(grad + head * grad_head, queries, grad_token, T, D, PADDED)
    row_logsumexp = tl.load(logsumexp + head * T + queries, mask=queries < T, other=0.0)
    row_delta = tl.load(delta + head * T + queries, mask=queries < T, other=0.0)
    result = tl.zeros((QUERIES, PADDED), tl.float32)
    begin = tl.maximum(tl.load(roots + first), first - reach + 1)
    for block in range(begin, tl.minimum(first + QUERIES, T), KEYS):
        keys = block + tl.arange(0, KEYS)
        k = _load(key + head // GROUP * key_head, keys, key_token, T, D, PADDED)
        v = _load(value + head // GROUP * value_head, keys, value_token, T, D, PADDED)
        seen = _visible(
            queries[:, None], keys[None, :], own[:, None], root[:, None], prefix_end[:, None], T, window
        )
        _, slope = _score_gradient(
            q, k, g, v, row_logsumexp[:, None], row_delta[:, None], seen, scale, SOFTCAP
        )
        result += tl.dot(slope.to(k.dtype), k, input_precision="ieee")
    _store(grad_query + head * out_head, queries, out_token, result * scale, T, D, PADDED)


@triton.jit
def key_value_gradient_kernel(
    query, key, value, grad, starts, roots, prefix_ends, ends, logsumexp, delta, grad_key, grad_value,
    T, window, reach, scale,
    query_token, query_head, key_token, key_head, value_token, value_head, grad_token, grad_head,
    out_token, out_head,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * KEYS
    shared = tl.program_id(1)
    keys = first + tl.arange(0, KEYS)
    k = _load(key + shared * key_head, keys, key_token, T, D, PADDED)
    v = _load(value + shared * value_head, keys, value_token, T, D, PADDED)
    sum_key = tl.zeros((KEYS, PADDED), tl.float32)
    sum_value = tl.zeros((KEYS, PADDED), tl.float32)
    # The last key has the latest end of group and window, so no query from `end` on attends to the block.
    last = tl.minimum(first + KEYS, T) - 1
    end = tl.minimum(tl.load(ends + last), last + reach)
    # All query heads of the shared key head, in one program instead of with atomics.
    for head in range(shared * GROUP, shared * GROUP + GROUP):
        for block in range(first, end, QUERIES):
            queries = block + tl.arange(0, QUERIES)
            own = tl.load(starts + queries, mask=queries < T, other=T)
            root = tl.load(roots + queries, mask=queries < T, other=T)
            prefix_end = tl.load(prefix_ends + queries, mask=queries < T, other=T)
            q = _load(query + head * query_head, queries, query_token, T, D, PADDED)
            g = _load(grad + head * grad_head, queries, grad_token, T, D, PADDED)
            row_logsumexp = tl.load(logsumexp + head * T + queries, mask=queries < T, other=0.0)
            row_delta = tl.load(delta + head * T + queries, mask=queries < T, other=0.0)
            seen = _visible(
                queries[None, :], keys[:, None], own[None, :], root[None, :], prefix_end[None, :], T, window
            )
            weights, slope = _score_gradient(
                k, q, v, g, row_logsumexp[None, :], row_delta[None, :], seen, scale, SOFTCAP
            )
            sum_value += tl.dot(weights.to(g.dtype), g, input_precision="ieee")
            sum_key += tl.dot(slope.to(q.dtype), q, input_precision="ieee")
    _store(grad_key + shared * out_head, keys, out_token, sum_key * scale, T, D, PADDED)
    _store(grad_value + shared * out_head, keys, out_token, sum_value, T, D, PADDED)


def block_size(channels: int, item_bytes: int, capability: int) -> int:
    """Return the tokens per block, of queries and keys alike; four such blocks must fit into shared memory."""
    padded = triton.next_power_of_2(channels) * item_bytes // 2
    if capability < 80:
        return {32: 64, 64: 64, 128: 32}.get(padded, 16)
    return {32: 64, 64: 64, 128: 64, 256: 32}.get(padded, 16)


def _options(query: torch.Tensor, key: torch.Tensor, softcap: float | None, block: int | None) -> dict:
    if block is None:
        major, minor = torch.cuda.get_device_capability(query.device)
        block = block_size(query.shape[2], query.element_size(), 10 * major + minor)
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "D": query.shape[2],
        "PADDED": triton.next_power_of_2(query.shape[2]),
        "SOFTCAP": softcap or 0.0,
        "QUERIES": block,
        "KEYS": block,
        "num_warps": 4,
        "num_stages": 1,
    }


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _dense_channels(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors with contiguous channels; tokens and heads may have any stride."""
    return [tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in tensors]


def _bounds(
    starts: torch.Tensor, prefixes: Prefixes | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each token's start of its document, start of its group, and end of the tokens that it shares."""
    starts = starts.contiguous()
    return (starts, starts, starts) if prefixes is None else (starts, prefixes.roots, prefixes.ends)


def _reach(window: int | None, prefixes: Prefixes | None, tokens: int) -> int:
    """Return how far before a query its first visible key may be: shared tokens are visible beyond a window."""
    return tokens if prefixes is not None else window or tokens


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    prefixes: Prefixes | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    block: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(scale * q k^T) v, (T, H, D), and the natural logsumexp of the scores, fp32 (H, T).

    query: (T, H, D); key, value: (T, K, D). starts: int32 (T,), where each token's document begins:
    token i attends to j with starts[i] <= j <= i and j > i - window, and to the tokens that it shares, if any,
    whatever the window. block: tokens per block, by device if None.
    """
    query, key, value = _dense_channels(query, key, value)
    tokens, heads, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    logsumexp = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    options = _options(query, key, softcap, block)
    reach = _reach(window, prefixes, tokens)
    with torch.cuda.device_of(query):
        forward_kernel[(triton.cdiv(tokens, options["QUERIES"]), heads)](
            query, key, value, *_bounds(starts, prefixes), out, logsumexp, tokens, window or tokens, reach, scale,
            *_strides(query, key, value, out), **options,
        )  # fmt: skip
    return out, logsumexp


def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    starts: torch.Tensor,
    prefixes: Prefixes | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    block: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, given that of out and the results of forward."""
    query, key, value, grad = _dense_channels(query, key, value, grad)
    tokens, heads, _ = query.shape
    bounds = _bounds(starts, prefixes)
    roots = bounds[1]
    ends = torch.searchsorted(roots, roots, right=True, out_int32=True)  # (T,), where each token's group ends
    delta = (grad.float() * out.float()).sum(-1).T.contiguous()  # (H, T), see ops/attention_cpu.py
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    options = _options(query, key, softcap, block)
    reach = _reach(window, prefixes, tokens)
    strides = _strides(query, key, value, grad)
    blocks = triton.cdiv(tokens, options["QUERIES"])
    with torch.cuda.device_of(query):
        query_gradient_kernel[(blocks, heads)](
            query, key, value, grad, *bounds, logsumexp, delta, grads[0], tokens, window or tokens, reach, scale,
            *strides, *_strides(grads[0]), **options,
        )  # fmt: skip
        key_value_gradient_kernel[(blocks, key.shape[1])](
            query, key, value, grad, *bounds, ends, logsumexp, delta, grads[1], grads[2], tokens,
            window or tokens, reach, scale, *strides, *_strides(grads[1]), **options,
        )  # fmt: skip
    return grads[0], grads[1], grads[2]
