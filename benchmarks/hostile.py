"""Every reader of outside input, and broken input for it: valid files with bytes flipped, values swapped, parts cut.

A reader either works or raises UserError (SystemExit with code 2 from argparse), soon, and leaves no file behind.
`fuzz.py` runs many inputs, `tests/test_fuzz.py` some.
"""

import json
import os
import re
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fettle.errors import UserError

SECONDS = 20
"""For one input. Most take milliseconds; a chat template may take five seconds of CPU time."""

# --- broken input ------------------------------------------------------------------------------------------

_RAW = "@raw{}@"
# What JSON can say and few expect. Texts that Python cannot write as JSON stand for themselves.
_RAW_JSON = (
    "9" * 5000, "-" + "9" * 400, "1e999", "NaN", "-Infinity", "[" * 3000 + "]" * 3000, '{"a":' * 500 + "1" + "}" * 500,
    '"\\ud800"', '"\\u0000"', "0.1e-400", "[,]", "{", '"', "nul", '{"a": 1, "a": 2}',
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**32 + 1, 2**63, 2**64, 10**18, 10**30, -(2**63), 0.5, -1.5, 1e300,
    "", " ", "x", "0", "null", "nan", "../..", "/etc/passwd", "\u202e", "\x1b[2J", "é", "漢字" * 9, "{{ 1 / 0 }}",
    "a" * 9999, [], [None], [0], [1, 2, 3], ["x"], [[]], [{}], {}, {"": None}, {"a": 1}, {"type": "x"},
    {"rope_type": "yarn"},
)  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        # A vocabulary of a thousand entries is one thing, not a thousand.
        for key in list(value)[:40]:
            yield from _paths(value[key], (*path, key))
    if isinstance(value, list):
        for index in range(min(len(value), 6)):
            yield from _paths(value[index], (*path, index))


def _changed(document: Any, path: tuple[Any, ...], change: str, value: Any) -> Any:
    if not path:
        return value
    copy = json.loads(json.dumps(document))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    if change == "delete":
        del parent[path[-1]]
    elif change == "rename" and isinstance(parent, dict):
        parent[str(value)[:50]] = parent.pop(path[-1])
    elif change == "repeat" and isinstance(parent, list):
        parent.extend([parent[path[-1]]] * 3)
    else:
        parent[path[-1]] = value
    return copy


def broken_json(document: Any) -> st.SearchStrategy[bytes]:
    """JSON like `document`, with one to three entries deleted, renamed, or given another value."""
    paths = list(_paths(document))
    raw = st.sampled_from(range(len(_RAW_JSON))).map(_RAW.format)
    value = st.one_of(st.sampled_from(_VALUES), raw, st.integers(), st.floats(), st.text(max_size=20))
    change = st.tuples(
        st.sampled_from(paths), st.sampled_from(["swap"] * 5 + ["delete", "rename", "repeat"]), value
    )

    def build(changes: list[tuple[tuple[Any, ...], str, Any]]) -> bytes:
        changed = document
        for path, kind, new in changes:
            try:
                changed = _changed(changed, path, kind, new)
            except (KeyError, IndexError, TypeError, AttributeError):  # an earlier change took the place away
                continue
        text = json.dumps(changed)
        text = re.sub(r'"@raw(\d+)@"', lambda found: _RAW_JSON[int(found[1])], text)
        return text.encode("utf-8", "surrogatepass")

    return st.lists(change, min_size=1, max_size=3).map(build)


def broken_bytes(content: bytes, head: int | None = None) -> st.SearchStrategy[bytes]:
    """`content` with one to six changes within its first `head` bytes: flips, insertions, parts cut out or repeated."""
    size = min(len(content), head or len(content))
    place, run = st.integers(0, max(size - 1, 0)), st.integers(1, 64)
    byte = st.one_of(st.sampled_from(b"\x00\xff\x7f\x80\n\"{}[],:'\\-0 "), st.integers(0, 255))
    change = st.one_of(
        st.tuples(st.just("flip"), place, byte),
        st.tuples(st.just("set"), place, byte),
        st.tuples(st.just("insert"), place, byte),
        st.tuples(st.just("cut"), place, run),
        st.tuples(st.just("repeat"), place, run),
        st.tuples(st.just("fill"), place, byte),
        st.tuples(st.just("end"), st.integers(0, len(content)), run),
    )

    def build(changes: list[tuple[str, int, int]]) -> bytes:
        data = bytearray(content)
        for kind, at, extra in changes:
            if kind == "flip" and at < len(data):
                data[at] ^= 1 << extra % 8
            elif kind == "set" and at < len(data):
                data[at] = extra
            elif kind == "insert":
                data[at:at] = bytes([extra])
            elif kind == "cut":
                del data[at : at + extra]
            elif kind == "repeat":
                data[at:at] = data[at : at + extra] * 3
            elif kind == "fill":
                data[at : at + 8] = bytes([extra]) * 8
            elif kind == "end":
                del data[at:]
        return bytes(data)

    return st.lists(change, min_size=1, max_size=6).map(build)


def broken_text(text: str) -> st.SearchStrategy[bytes]:
    """`text` in bytes: changed, or in another encoding."""
    others = [text.encode(name) for name in ("utf-16", "utf-32", "utf-8-sig", "utf-16-le")] + [
        b"",
        b"\0",
        b"\xff" * 9,
    ]
    return st.one_of(broken_bytes(text.encode()), st.sampled_from(others))


def broken_document(document: Any) -> st.SearchStrategy[bytes]:
    """A JSON file with other values, or changed as text."""
    return st.one_of(broken_json(document), broken_json(document), broken_text(json.dumps(document)[:20000]))


# --- the readers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """read: given the broken content and a folder of its own, as fettle would. share: of the inputs, for slow ones."""

    inputs: Callable[[], st.SearchStrategy[Any]]
    read: Callable[[Any, Path], object]
    share: float = 1.0


class OutOfTime(BaseException):
    """No Exception: a reader that turns all of those into a UserError must not hide it."""


def outcome(reader: Reader, content: Any) -> str:
    """Read once; return "works" or "refused". Raises what the reader should not have raised, or OutOfTime."""
    with tempfile.TemporaryDirectory() as name, _limit(SECONDS):
        try:
            reader.read(content, Path(name))
        except UserError as error:
            if not str(error).strip():
                raise AssertionError("an error without words") from error
            return "refused"
        except SystemExit as error:
            if error.code != 2:
                raise AssertionError(f"exit code {error.code}") from error
            return "refused"
    return "works"


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def end(*given: Any) -> None:
        raise OutOfTime(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@cache
def _home() -> Path:
    """A folder for what all inputs share; removed with the process's other temporary files by the system."""
    return Path(tempfile.mkdtemp(prefix="fettle-fuzz-"))


@cache
def small_model() -> Path:
    """A Llama of one layer with random weights and the embedded model's tokenizer."""
    import torch
    from transformers import GenerationConfig, LlamaConfig

    from fettle.checkpoints.locate import embedded_model
    from fettle.models.decoder import causal_lm_class
    from fettle.models.load import load_tokenizer
    from fettle.models.save import save_model

    torch.manual_seed(0)
    tokenizer = load_tokenizer(embedded_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )  # fmt: skip
    model = causal_lm_class("llama")(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[1, 2], do_sample=True, temperature=0.7, top_p=0.9
    )
    save_model(model, tokenizer, _home() / "model")
    load_tokenizer(_home() / "model")  # so that no input's time is that of imports
    return _home() / "model"


@cache
def small_adapter() -> Path:
    """A LoRA adapter of rank 2 for `small_model`."""
    from fettle.adapters.lora import adapt
    from fettle.models.load import load_model

    model = adapt(load_model(small_model(), name=str(small_model())), rank=2, alpha=4)
    model.save_pretrained(_home() / "adapter")
    from fettle.checkpoints.adapter_facts import AdapterFacts, write_facts
    from fettle.checkpoints.fingerprint import fingerprint

    write_facts(
        _home() / "adapter", AdapterFacts(base_fingerprint=fingerprint(small_model()), context_tokens=32)
    )
    return _home() / "adapter"


@cache
def small_gguf() -> Path:
    from fettle.export.gguf import export_gguf

    return export_gguf(small_model(), _home() / "m.gguf", quantizations=["f16"])[0]


def _copy_with(source: Path, folder: Path, name: str, content: bytes) -> Path:
    """A copy of a model's folder with one file broken; the others are links."""
    target = folder / "m"
    target.mkdir()
    for file in source.iterdir():
        if file.name != name:
            os.symlink(file, target / file.name)
    (target / name).write_bytes(content)
    return target


def _loads(source: Callable[[], Path], name: str) -> Callable[[bytes, Path], object]:
    def read(content: bytes, folder: Path) -> object:
        from fettle.engine.load import load
        from fettle.engine.request import Sampling
        from fettle.engine.text import generate

        model, tokenizer = load(_copy_with(source(), folder, name, content))
        return generate(model, tokenizer, "Spell cat.", sampling=Sampling(max_new_tokens=2))

    return read


def _document(source: Callable[[], Path], name: str) -> Callable[[], st.SearchStrategy[bytes]]:
    return lambda: broken_document(json.loads((source() / name).read_text()))


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say 3.", "weight": 0, "name": "x"},
        {"role": "assistant", "content": [{"type": "text", "text": "Here is 3!"}], "reasoning_content": "hm"},
    ]
}
ROWS = [
    CHAT,
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"instruction": "i", "input": "j", "output": "o", "history": [["a", "b"]], "system": "s"},
    {"prompt": "p", "completion": "c"},
    {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]},
    {"text": "once upon a time"},
]


def _reads_rows(ending: str) -> Callable[[bytes, Path], object]:
    def read(content: bytes, folder: Path) -> object:
        from fettle.data import fingerprint, read_rows, tokenize_rows

        file = folder / f"rows{ending}"
        file.write_bytes(content)
        rows = read_rows(file)
        fingerprint(file)
        return tokenize_rows(rows, _tokenizer(), max_length=64)

    return read


@cache
def _tokenizer() -> Any:
    from fettle.models.load import load_tokenizer

    return load_tokenizer(small_model())


def rows_of(strategy: Callable[[], st.SearchStrategy[bytes]]) -> Callable[[], st.SearchStrategy[bytes]]:
    """The same inputs, once the tokenizer that the rows meet is there."""

    def inputs() -> st.SearchStrategy[bytes]:
        _reads_rows(".jsonl")(json.dumps(ROWS[-1]).encode(), _home())
        return strategy()

    return inputs


def _json_lines() -> st.SearchStrategy[bytes]:
    line = st.sampled_from(ROWS).flatmap(broken_json)
    whole = "\n".join(json.dumps(row) for row in ROWS)
    return st.one_of(line, st.lists(line, min_size=2, max_size=3).map(b"\n".join), broken_text(whole))


def _csv() -> st.SearchStrategy[bytes]:
    quoted = json.dumps(CHAT["messages"]).replace('"', '""')
    tables = [
        'prompt,completion\n"a ""b""\nc",d\ne,f\n',
        f'messages\n"{quoted}"\n',
        "instruction;output;input\nx;y;\n",
        "text\nhello\n",
    ]
    return st.one_of(*map(broken_text, tables))


def _parquet() -> st.SearchStrategy[bytes]:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = {
        "messages": [{"role": turn["role"], "content": str(turn["content"])} for turn in CHAT["messages"]]
    }
    files = []
    for rows in ([plain], ROWS[1:2], [{"text": "a"}, {"text": None}], [{"prompt": 1, "completion": 2.5}]):
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), stream)
        files.append(stream.getvalue())
    columns = st.dictionaries(
        st.sampled_from(["text", "messages", "prompt", "completion", "conversations", "x"]),
        st.sampled_from([
            pa.array([1, None]), pa.array([b"\xff", b""]), pa.array([[], None]), pa.array([{"role": "user"}, None]),
            pa.array([None, None]), pa.array([0, 1], pa.timestamp("ns")), pa.array(["a", "b"]).dictionary_encode(),
            pa.array([1, 2], pa.decimal128(20, 2)), pa.array([[{"role": "user", "content": None}], []]),
        ]),
        min_size=1,
    )  # fmt: skip

    def written(chosen: dict[str, Any]) -> bytes:
        stream = io.BytesIO()
        pq.write_table(pa.table(chosen), stream)
        return stream.getvalue()

    return st.one_of(*map(broken_bytes, files), columns.map(written))


def _safetensors() -> st.SearchStrategy[bytes]:
    content = (small_model() / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header = {name: header[name] for name in list(header)[:6]}

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return st.one_of(broken_json(header).map(with_header), broken_bytes(content, 8 + length))


def _index() -> st.SearchStrategy[bytes]:
    return broken_document(
        {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(["a", "b"], "x.safetensors")}
    )


def _read_index(content: bytes, folder: Path) -> object:
    from fettle.checkpoints.folder import inspect

    model = _copy_with(small_model(), folder, "model.safetensors.index.json", content)
    (model / "model.safetensors").rename(model / "x.safetensors")
    return inspect(model)


def _gguf() -> st.SearchStrategy[bytes]:
    content = small_gguf().read_bytes()
    return st.one_of(
        rewritten_gguf(), rewritten_gguf(), broken_bytes(content, 4096), broken_bytes(content, 64)
    )


def rewritten_gguf() -> st.SearchStrategy[bytes]:
    """A file that is well formed, with up to three entries that are missing or of another value, type or length."""
    from gguf import GGUFReader, GGUFValueType

    reader = GGUFReader(small_gguf())
    kinds = {name: each.types for name, each in reader.fields.items() if not name.startswith("GGUF.")}
    entries = {name: (kind, reader.fields[name].contents()) for name, kind in kinds.items()}
    data = bytes(reader.data[reader.data_offset :])
    formats = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 8: "", 10: "<Q", 11: "<q", 12: "<d"}

    def scalar(kind: int, value: Any) -> bytes:
        if kind == GGUFValueType.STRING:
            text = str(value).encode()
            return struct.pack("<Q", len(text)) + text
        return struct.pack(formats[kind], value)

    def entry(name: str, types: list[int], value: Any) -> bytes:
        if types[0] != GGUFValueType.ARRAY:
            return scalar(8, name) + struct.pack("<I", types[0]) + scalar(types[0], value)
        items = b"".join(scalar(types[-1], item) for item in value)
        return scalar(8, name) + struct.pack("<IIQ", 9, types[-1], len(value)) + items

    def build(changes: list[tuple[str, tuple[list[int], Any] | None]]) -> bytes:
        new = entries | dict(changes)
        written = [entry(name, *pair) for name, pair in new.items() if pair is not None]
        head = b"GGUF" + struct.pack("<IQQ", 3, len(reader.tensors), len(written)) + b"".join(written)
        for each in reader.tensors:
            shape = [int(size) for size in each.shape]
            head += scalar(8, each.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            head += struct.pack("<IQ", each.tensor_type, each.data_offset - reader.data_offset)
        return head + bytes(-len(head) % 32) + data

    number = st.sampled_from([0, 1, 2, 3, 31, 33, 1279, 1280, 1281, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
    values = st.one_of(
        st.none(),
        number.map(lambda value: ([4], value)),
        number.map(lambda value: ([10], value * 2**31)),
        st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 1e-38, 3e38]).map(lambda value: ([6], value)),
        st.sampled_from(["", "x", "llama", "gpt2", "bert", "gemma", "yarn", "t5", "\x00", "é" * 99]).map(
            lambda text: ([8], text)
        ),
        st.booleans().map(lambda value: ([7], value)),
        st.lists(st.sampled_from(["", "a", "<s>", "\x00", "▁"]), max_size=3).map(
            lambda texts: ([9, 8], texts)
        ),
        st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3).map(lambda numbers: ([9, 5], numbers)),
    )
    return st.lists(st.tuples(st.sampled_from(list(entries)), values), min_size=1, max_size=3).map(build)


def _read_gguf(content: bytes, folder: Path) -> object:
    from fettle.engine.load import load
    from fettle.engine.request import Sampling
    from fettle.engine.text import generate

    (folder / "m.gguf").write_bytes(content)
    model, tokenizer = load(folder / "m.gguf")
    return generate(model, tokenizer, "Spell cat.", sampling=Sampling(max_new_tokens=2))


def _run_file() -> st.SearchStrategy[bytes]:
    from fettle.runs.options import TrainOptions

    fields = TrainOptions.__dataclass_fields__
    lines = "model: fettle-tiny\ndata: rows.jsonl\noutput: out\nrank: 8\nlearning_rate: 2e-4\n"
    value = st.sampled_from([
        "null", "~", "", "9" * 5000, ".nan", "-.inf", "1e999", "yes", "[", "{a: 1}", "&a [*a]", "*a",
        "!!python/name:os.system", "!!int 3", "0x10", "2026-01-01", "|\n  x", "'", '"\\ud800"', "[" * 2000, "- - -",
        "<<: *x",
        "\x00", "1_000", "auto", "-1", "0",
    ])  # fmt: skip
    entry = st.tuples(st.sampled_from([*fields, "x", "<<", "? a", ""]), value).map(": ".join)
    entries = st.lists(entry, min_size=1, max_size=4).map("\n".join).map(lambda text: (lines + text).encode())
    return st.one_of(entries, broken_text(lines))


def _read_run_file(content: bytes, folder: Path) -> object:
    from fettle.options import read
    from fettle.runs.defaults import require_valid
    from fettle.runs.options import TrainOptions

    (folder / "run.yaml").write_bytes(content)
    options = read(TrainOptions, folder / "run.yaml")
    require_valid(options)
    return options


def _words() -> st.SearchStrategy[list[str]]:
    from fettle.runs.options import PlanOptions

    names = ["--" + name.replace("_", "-") for name in PlanOptions.__dataclass_fields__]
    number = st.sampled_from([
        "9" * 5000, "1e400", "nan", "-inf", "16GB", "0", "-1", "1e-400", "", " ", "٣", "1_0", "0x1", "\udcff",
        "x" * 9999,
        "9" * 400 + "GB", ".GB", "1.GB", "0.0000001GB", "1" * 400 + "." + "1" * 400, "fp32", "all", "../",
        "a\0b", "é\n",
    ])  # fmt: skip
    option = st.tuples(st.sampled_from(names), st.one_of(number, st.text(max_size=8)))
    return st.lists(option, min_size=1, max_size=4).map(
        lambda pairs: [word for pair in pairs for word in pair]
    )


def _read_words(words: list[str], folder: Path) -> object:
    """As `fettle plan` does, up to the model."""
    from fettle.cli.main import _parser
    from fettle.options import resolve
    from fettle.runs.defaults import require_valid
    from fettle.runs.options import PlanOptions

    given = vars(_parser().parse_args(["plan", "--model", "fettle-tiny", *words]))
    options = resolve(PlanOptions, given, given.pop("config", None))
    require_valid(options)
    if options.memory is not None:
        from fettle.planning.budget import parse_bytes

        parse_bytes(options.memory)
    return options


TEMPLATES = [
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m.content | trim ~ eos_token }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.first %}{% set ns.n = ns.n + 1 %}{% endif %}"
    "{{ m | tojson }}{{ range(3) | list }}{% endfor %}{% macro f(x) %}{{ x * 2 }}{% endmacro %}{{ f('a') }}",
    "{% if not messages %}{{ raise_exception('none') }}{% endif %}{{ messages[0]['content'][:5].split('a') | join }}",
]


def _templates() -> st.SearchStrategy[bytes]:
    return st.one_of(*map(broken_text, TEMPLATES))


def _read_template(content: bytes, folder: Path) -> object:
    from fettle.data import generation_prompt
    from fettle.models.load import load_tokenizer

    tokenizer = load_tokenizer(_copy_with(small_model(), folder, "chat_template.jinja", content))
    return generation_prompt(tokenizer, [{"role": "user", "content": "Say 3."}])


def _facts() -> st.SearchStrategy[bytes]:
    answers = [{"prompt": "p", "expected": "e", "answer": "a"}]
    before = {"held_out": {"loss": 1.5}, "exact": 0.5, "kept_exact": None, "answers": answers}
    marks = {"data": "0" * 64, "model": "1" * 64, "tokenizer": "2" * 64}
    return broken_document({"fingerprints": marks, "before": before, "seconds": 1.5, "base_steps": 3})


def _read_facts(content: bytes, folder: Path) -> object:
    from fettle.runs import resume
    from fettle.runs.measure import Measurement
    from fettle.runs.options import TrainOptions

    (folder / "facts.json").write_bytes(content)
    facts = resume.read_facts(folder)
    options = TrainOptions(model="m", data="d", output="o")
    resume.require_unchanged(facts, {"data": "0" * 64, "model": "1" * 64, "tokenizer": "2" * 64}, options)
    return Measurement.from_facts(facts["before"]) if "before" in facts else None


READERS: dict[str, Reader] = {
    "data rows, jsonl": Reader(rows_of(_json_lines), _reads_rows(".jsonl")),
    "data rows, json": Reader(rows_of(lambda: broken_document(ROWS)), _reads_rows(".json")),
    "data rows, csv": Reader(rows_of(_csv), _reads_rows(".csv")),
    "data rows, parquet": Reader(rows_of(_parquet), _reads_rows(".parquet")),
    "data rows, txt": Reader(rows_of(lambda: broken_text("Once upon a time\n" * 3)), _reads_rows(".txt")),
    "config.json": Reader(_document(small_model, "config.json"), _loads(small_model, "config.json"), 0.5),
    "generation_config.json": Reader(
        _document(small_model, "generation_config.json"), _loads(small_model, "generation_config.json"), 0.3
    ),
    "tokenizer.json": Reader(
        _document(small_model, "tokenizer.json"), _loads(small_model, "tokenizer.json"), 0.3
    ),
    "tokenizer_config.json": Reader(
        _document(small_model, "tokenizer_config.json"), _loads(small_model, "tokenizer_config.json"), 0.3
    ),
    "special_tokens_map.json": Reader(
        lambda: broken_document(
            {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<a>"]}
        ),
        _loads(small_model, "special_tokens_map.json"),
        0.1,
    ),
    "adapter_config.json": Reader(
        _document(small_adapter, "adapter_config.json"), _loads(small_adapter, "adapter_config.json"), 0.3
    ),
    "fettle.json": Reader(_document(small_adapter, "fettle.json"), _loads(small_adapter, "fettle.json"), 0.2),
    "model.safetensors": Reader(_safetensors, _loads(small_model, "model.safetensors"), 0.5),
    "model.safetensors.index.json": Reader(_index, _read_index),
    "GGUF": Reader(_gguf, _read_gguf, 0.5),
    "run.yaml": Reader(_run_file, _read_run_file),
    "options": Reader(_words, _read_words),
    "chat_template.jinja": Reader(_templates, _read_template, 0.3),
    "facts.json": Reader(_facts, _read_facts),
}
