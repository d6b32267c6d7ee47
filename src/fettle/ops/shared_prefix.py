"""Documents of a pack that share their beginning, such as one prompt with several answers: computed once, exactly.

A group is a root document (the prompt with its first answer) and, right behind it, documents that continue the root's
first tokens (the other answers). Tokens of the latter attend to their own document and to the shared tokens:

    out = exp(l1 - l) out1 + exp(l2 - l) out2,    l = log(exp(l1) + exp(l2))

where out1, l1 are result and logsumexp of attention within the documents, and out2, l2 those of attention to the
shared tokens, without a causal limit, as all of them come before (Juravsky et al., 2024, arXiv 2402.05099, section 3).
Backward of either part is that of attention alone, given the merged out and l, as a weight is exp(score - l). A sliding
window does not hide shared tokens, so it must be as long as every document with the tokens that it shares.

Shapes: T tokens in the pack, G groups, H heads, D channels per head.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prefixes:
    """The shared tokens of a pack; made once per batch, used by every layer.

    roots: (T,) int32, where the root of each token's group begins. ends: (T,) int32, where the shared tokens end to
    which the token attends besides its own document; in a root, where the root begins.

    query_bounds, key_bounds: int32 (2 * G + 2,). The tokens between bounds 2 g + 1 and 2 g + 2 of the first attend to
    those between the same bounds of the second. The other parts complete the pack; what they give is to be ignored.
    longest_query, longest_key: of all parts.
    """

    roots: torch.Tensor
    ends: torch.Tensor
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, bounds: torch.Tensor, shared: torch.Tensor) -> "Prefixes":
        """bounds: (documents + 1,), where each document starts, and T. shared: (documents,), how many tokens of its
        root each of them continues; 0 for a root. Raises ValueError if a document has no root that fits."""
        starts, lengths, is_root = bounds[:-1], bounds.diff(), shared == 0
        group = is_root.cumsum(0) - 1
        roots, total = starts[is_root], bounds[-1:]
        of_group = torch.zeros_like(roots).scatter_reduce(0, group.clamp(min=0), shared, "amax")
        fits = bool(is_root[0]) and bool((is_root | (shared == of_group[group])).all())
        if not fits or bool((of_group > lengths[is_root]).any()):
            raise ValueError("documents that continue another one must follow it, and share its first tokens")
        prefix_ends = roots + of_group
        group_ends = torch.cat((roots[1:], total))
        first = bounds[:1]
        query_bounds = torch.cat((first, torch.stack((bounds[1:][is_root], group_ends), 1).flatten(), total))
        key_bounds = torch.cat((first, torch.stack((roots, prefix_ends), 1).flatten(), total))
        per_document = torch.stack((roots[group], torch.where(is_root, starts, prefix_ends[group])))
        per_token = per_document.repeat_interleave(lengths, dim=1).int()
        return cls(
            *(per_token[0], per_token[1], query_bounds.int(), key_bounds.int()),
            int(query_bounds.diff().max()),
            int(key_bounds.diff().max()),
        )

    @property
    def continues(self) -> torch.Tensor:
        """Return, (T,) bool, whether each token attends to shared tokens besides its own document."""
        return self.ends > self.roots

    def spans(self) -> list[tuple[slice, slice]]:
        """Return, per group, the tokens that attend to shared ones, and those; reads the device."""
        queries, keys = self.query_bounds.tolist(), self.key_bounds.tolist()
        parts = ((slice(*queries[n : n + 2]), slice(*keys[n : n + 2])) for n in range(1, len(queries) - 1, 2))
        return [(q, k) for q, k in parts if q.start < q.stop]


def merge(
    out: torch.Tensor, logsumexp: torch.Tensor, other: torch.Tensor, other_logsumexp: torch.Tensor
) -> None:
    """Merge another part's result into `out` (T, H, D), and its logsumexp into `logsumexp` (H, T), in place."""
    total = torch.logaddexp(logsumexp, other_logsumexp)
    share, other_share = (torch.exp(each - total).T[..., None] for each in (logsumexp, other_logsumexp))
    out.copy_(out * share + other * other_share)
    logsumexp.copy_(total)
