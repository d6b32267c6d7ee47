"""Write safetensors files tensor by tensor, so that only one tensor is in memory.

A file begins with the names, dtypes and offsets of its tensors, which are known only at the end: space is reserved for
them, and the rest is filled with spaces, as the format allows. Readers map tensors in place, so offsets must be
multiples of the item size: a tensor whose length would misalign the next one is written at the end of its file.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from fettle.checkpoints.dtypes import SAFETENSORS
from fettle.checkpoints.folder import WEIGHTS, WEIGHTS_INDEX

SHARD_BYTES = 5 * 10**9
"""Maximum size of a file, as on the hub; a larger tensor gets its own file."""

ENTRY_BYTES = 256
"""Upper bound for a tensor's entry in the header."""

ALIGNMENT = 8

NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}


class ShardWriter:
    """`with ShardWriter(folder, tensors=n) as shards: shards.add(name, tensor)`, n times at most."""

    def __init__(self, folder: Path, *, tensors: int) -> None:
        self.folder = folder
        self._header_bytes = ENTRY_BYTES * (tensors + 1)
        self._files: list[list[str]] = []
        """Names of the tensors in each file."""
        self._stream: BinaryIO | None = None
        self._entries: dict[str, Any] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._written = self._taken = self._total = 0
        """Bytes written to the current file, bytes assigned to it including waiting tensors, and bytes of all files."""

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, where: TracebackType | None) -> None:
        if kind is None:
            self._end_file()
            self._name_files()
        elif self._stream is not None:
            self._stream.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the tensor, to a new file if the current one would exceed SHARD_BYTES."""
        size = tensor.numel() * tensor.element_size()
        if self._stream is None or (self._taken and self._taken + size > SHARD_BYTES):
            self._end_file()
            self._stream = open(self._place(len(self._files)), "wb")  # noqa: SIM115  # closed by _end_file
            self._stream.seek(8 + self._header_bytes)
            self._files.append([])
        self._files[-1].append(name)
        self._taken += size
        self._total += size
        if size % ALIGNMENT:
            self._waiting[name] = tensor
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        assert self._stream is not None
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        begin, self._written = self._written, self._written + data.nbytes
        place = {"shape": list(tensor.shape), "data_offsets": [begin, self._written]}
        self._entries[name] = {"dtype": NAMES[tensor.dtype], **place}
        self._stream.write(data.data)

    def _end_file(self) -> None:
        if self._stream is None:
            return
        for name, tensor in sorted(self._waiting.items(), key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        head = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")).encode()
        if len(head) > self._header_bytes:
            raise RuntimeError(
                f"the header takes {len(head)} bytes, but only {self._header_bytes} were reserved for it"
            )
        self._stream.seek(0)
        self._stream.write(self._header_bytes.to_bytes(8, "little") + head.ljust(self._header_bytes))
        self._stream.close()
        self._stream, self._entries, self._waiting = None, {}, {}
        self._written = self._taken = 0

    def _place(self, number: int) -> Path:
        return self.folder / f"shard-{number}"

    def _name_files(self) -> None:
        """Rename the files as readers expect them, and write the index if there are several."""
        count = len(self._files)
        if count == 1:
            self._place(0).rename(self.folder / WEIGHTS)
            return
        names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        for number, name in enumerate(names):
            self._place(number).rename(self.folder / name)
        places = {
            tensor: name for tensors, name in zip(self._files, names, strict=True) for tensor in tensors
        }
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(places.items()))}
        (self.folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
