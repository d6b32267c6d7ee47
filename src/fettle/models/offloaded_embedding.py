"""A frozen token embedding outside the memory that training needs.

A step reads only a few thousand rows of the table, however large it is. So with a GPU it can stay in host memory, and
on a CPU memory-mapped in its file. The results are identical.
"""

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class OffloadedEmbedding(nn.Embedding):
    """An `nn.Embedding` whose `weight` (rows, channels) stays on the CPU under `.to(device)`.

    The weight is not a parameter, but it is saved like one.
    """

    def __init__(
        self, table: torch.Tensor, padding_idx: int | None, mapping: mmap.mmap | None = None
    ) -> None:
        """mapping: of the table's file; the pages that a lookup read are released again."""
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._table = table.detach().cpu()
        self._mapping = mapping

    @classmethod
    def mapped(
        cls, file: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype, padding_idx: int | None
    ) -> "OffloadedEmbedding":
        """Map the table from `file`, starting at byte `start`. Copy-on-write: writes do not change the file."""
        content = np.memmap(
            file, dtype=np.uint8, mode="c", offset=start, shape=math.prod(shape) * dtype.itemsize
        )
        mapping = content._mmap  # type: ignore[attr-defined]  # numpy has no public accessor
        return cls(torch.from_numpy(content).view(dtype).view(shape), padding_idx, mapping)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a parameter there
        """The table."""
        return self._table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (...,) on any device -> (..., channels) on the same."""
        is_elsewhere = ids.device.type != "cpu"
        rows = torch.empty(ids.numel(), self.embedding_dim, dtype=self._table.dtype, pin_memory=is_elsewhere)
        torch.index_select(self._table, 0, ids.flatten().cpu(), out=rows)
        if self._mapping is not None:  # readahead maps far more pages than the rows need
            self._mapping.madvise(mmap.MADV_DONTNEED)
        return rows.to(ids.device, non_blocking=True).view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> "OffloadedEmbedding":
        """Apply a change of dtype to the table, but not a change of device."""
        dtype = fn(self._table[:0]).dtype
        if dtype != self._table.dtype:
            self._table, self._mapping = self._table.to(dtype), None  # a copy, no longer the mapping
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._table
