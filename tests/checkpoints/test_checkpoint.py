"""Finding checkpoints, and finding out that they are broken before anything is built on them.

The safetensors library is the oracle: the files are written by it and then damaged, and whatever it refuses
to open must be refused here too, with a sentence in place of its exception.
"""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fettle.checkpoints import locate as finding
from fettle.checkpoints.fingerprint import fingerprint
from fettle.checkpoints.folder import (
    inspect,
    is_adapter,
    read_adapter_config,
    require_tokenizer,
    weight_files,
)
from fettle.checkpoints.locate import locate
from fettle.checkpoints.safetensors_header import read_places
from fettle.errors import UserError


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(40, 8, generator=generator, dtype=torch.bfloat16),
        "layer.weight": torch.randn(8, 1200, generator=generator),
        "layer.bias": torch.randn(8, generator=generator, dtype=torch.float16),
        "layer.scale": torch.randn((), generator=generator),
        "layer.nothing": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
    }


def write_model(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3", **config}))
    save_file(some_tensors() if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_shards(folder: Path, parts: int = 3, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    write_model(folder)
    (folder / "model.safetensors").unlink()
    tensors = some_tensors() if tensors is None else tensors
    weight_map: dict[str, str] = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        names = list(tensors)[part::parts]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# --- a sound checkpoint ------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_model, write_shards])
def test_inspect_agrees_with_the_safetensors_library(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    found = inspect(write(tmp_path))
    expected = {}
    for file in found.weight_files:
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (it is no dict)
                part = stream.get_slice(name)
                expected[name] = (part.get_dtype(), tuple(part.get_shape()))
                assert found.tensor_files[name] == file
    assert found.tensors == expected
    assert found.tensors["embed.weight"] == ("BF16", (40, 8))
    assert found.weight_bytes == sum(t.numel() * t.element_size() for t in some_tensors().values())
    assert found.config == {"model_type": "phi3"}
    assert found.quantization_config is None


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    write_model(tmp_path)
    monkeypatch.setattr("builtins.open", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"config\.json cannot be read \(Permission denied\)"):
        inspect(tmp_path)


def test_places_are_where_the_bytes_stand(tmp_path: Path) -> None:
    file = write_model(tmp_path) / "model.safetensors"
    place = read_places(file)["layer.weight"]
    stored = torch.frombuffer(bytearray(file.read_bytes()[place.start : place.end]), dtype=torch.float32)
    assert torch.equal(stored.view(8, 1200), some_tensors()["layer.weight"])


def test_quantised_weights_are_told_and_remote_code_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    write_model(tmp_path, quantization_config={"quant_method": "awq"}, auto_map={"AutoConfig": "evil.Config"})
    assert inspect(tmp_path).quantization_config == {"quant_method": "awq"}


# --- damaged weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 100, -2000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    file = write_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated: .* bytes missing"):
        inspect(tmp_path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (write_model(tmp_path) / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors is empty"):
        inspect(tmp_path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    with open(write_model(tmp_path) / "model.safetensors", "ab") as stream:
        stream.write(b"more")
    with pytest.raises(UserError, match="4 bytes follow its last tensor"):
        inspect(tmp_path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4976698672\n"
    (write_model(tmp_path) / "model.safetensors").write_text(pointer)
    (tmp_path / "tokenizer.json").write_text(pointer)
    for check in (inspect, require_tokenizer, fingerprint):
        with pytest.raises(UserError, match="git lfs pull"):
            check(tmp_path)


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` work on the header's JSON and write it back; the tensors stay as they are."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def shift(entries: dict[str, Any], name: str, by: int) -> None:
    entries[name]["data_offsets"] = [offset + by for offset in entries[name]["data_offsets"]]


HEADER_FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a gap or overlap": lambda e: shift(e, "layer.bias", 8),
    "an overlap": lambda e: e["layer.bias"].update(data_offsets=e["layer.weight"]["data_offsets"]),
    "beyond the end": lambda e: shift(e, "mask", 10**12),
    "negative": lambda e: shift(e, "layer.weight", -(10**9)),
    "backwards": lambda e: e["layer.weight"]["data_offsets"].reverse(),
    "fractions": lambda e: shift(e, "mask", 0.5),  # type: ignore[arg-type]
    "too few offsets": lambda e: e["mask"].update(data_offsets=[0]),
    "no offsets": lambda e: e["mask"].pop("data_offsets"),
    "no type": lambda e: e["mask"].pop("dtype"),
    "unknown type": lambda e: e["mask"].update(dtype="Q4_K"),
    "type of another size": lambda e: e["layer.bias"].update(dtype="F32"),
    "no shape": lambda e: e["mask"].update(shape=None),
    "another shape": lambda e: e["layer.weight"].update(shape=[8, 1201]),
    "negative shape": lambda e: e["layer.weight"].update(shape=[-8, -1200]),
    "a tensor left out": lambda e: e.pop("layer.weight"),
    "entry is a list": lambda e: e.update(mask=[1, 2]),
    "shape of fractions": lambda e: e["mask"].update(shape=[2.0]),
    "shape of truths": lambda e: e["mask"].update(shape=[True, 2]),
    "metadata is no table": lambda e: e.update(__metadata__=3),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_corrupt_header_is_named(tmp_path: Path, fault: str) -> None:
    file = write_model(tmp_path) / "model.safetensors"
    rewrite_header(file, HEADER_FAULTS[fault])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (0, "claims a length of 0"),
        (1, "header is not JSON"),
        (40, "header is not JSON"),
        (10**8, "truncated"),
        (2**31, "claims a length of 2147483648"),
        (2**64 - 1, "claims a length"),
    ],
)
def test_a_nonsense_header_length_is_named(tmp_path: Path, length: int, said: str) -> None:
    file = write_model(tmp_path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(UserError, match=rf"model\.safetensors is .*{said}"):
        inspect(tmp_path)


@pytest.mark.parametrize("header", ["[]", "3", "{}", '{"__metadata__": {}}'])
def test_a_header_without_tensors_is_named(tmp_path: Path, header: str) -> None:
    file = write_model(tmp_path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(UserError, match=r"model\.safetensors (contains no tensors|is not a valid)"):
        inspect(tmp_path)


def test_what_the_library_refuses_is_refused_and_nothing_else_is_raised(tmp_path: Path) -> None:
    file = write_model(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    rng, refused = random.Random(0), 0
    for position in range(header_end):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            inspect(tmp_path)
            with safe_open(file, framework="pt") as stream:
                list(stream.keys())
        except UserError:
            refused += 1
        except SafetensorError as error:
            pytest.fail(f"byte {position}: the library refuses ({error}), inspect does not")
    assert refused > header_end / 2


# --- missing and foreign files -----------------------------------------------------------------------------


def test_shards_that_are_missing_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"names 3 weight files, but model-00002-of-00003\.safetensors is missing"
    ):
        inspect(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    sound = json.loads(index.read_text())
    for wrong, said in (
        (
            sound["weight_map"] | {"lm_head.weight": "model-00001-of-00003.safetensors"},
            "lm_head.weight is in",
        ),
        (sound["weight_map"] | {"mask": "model-00001-of-00003.safetensors"}, "mask is in"),
        (sound["weight_map"] | {"mask": "../model.safetensors"}, "weight_map"),
        (sound["weight_map"] | {"mask": "a" * 300}, "weight_map"),
        ({}, "weight_map"),
        (["mask"], "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(UserError, match=said):
            inspect(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file(some_tensors(), tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match="and so does"):
        inspect(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "training_args.bin").write_bytes(b"")  # no weights: not to be named
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "executed").encode() + b"'\ntR.")
    with pytest.raises(UserError, match=rf"only as {name}, a pickle .* convert it to model\.safetensors"):
        inspect(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (write_model(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights: model\.safetensors is missing"):
        inspect(tmp_path)
    save_file(some_tensors(), tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="shards need their index"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no config.json"),
        (b"", "empty"),
        (b'{"model_type": "phi3",\n "hidden_size": }', "malformed JSON at line 2, column 17"),
        (b'{"model_type": "\xff\xff"}', "not valid JSON"),
        (b"[1]", "expected an object"),
        (b'{"hidden_size": 8}', "model_type"),
        (b"[" * 200_000, "config.json"),
    ],
)
def test_a_bad_config_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    config = write_model(tmp_path) / "config.json"
    config.unlink() if content is None else config.write_bytes(content)
    with pytest.raises(UserError, match=said):
        inspect(tmp_path)


def test_a_tokenizer_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer: add .*tokenizer\.json"):
        require_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(UserError, match=r"only as tokenizer\.model, but fettle reads only tokenizer\.json"):
        require_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0",')
    with pytest.raises(UserError, match=r"tokenizer\.json is malformed JSON at line 1"):
        require_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    require_tokenizer(tmp_path)


def test_the_real_tokenizers_and_configs_are_accepted(shared_data: Path, tmp_path: Path) -> None:
    folders = sorted((shared_data / "checkpoints").iterdir())
    assert len(folders) >= 6
    for folder in folders:
        require_tokenizer(folder)
        with pytest.raises(UserError, match="no weights"):  # the config is read, the weights are not there
            inspect(folder)


# --- adapters ----------------------------------------------------------------------------------------------


def write_adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "base_model_name_or_path": "fettle-tiny", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file({"a.lora_A.weight": torch.ones(2, 4)}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_is_recognised_and_read(tmp_path: Path) -> None:
    assert not is_adapter(write_model(tmp_path / "model"))
    assert is_adapter(write_adapter(tmp_path / "adapter"))
    assert read_adapter_config(tmp_path / "adapter")["base_model_name_or_path"] == "fettle-tiny"
    assert weight_files(tmp_path / "adapter") == [tmp_path / "adapter" / "adapter_model.safetensors"]
    with pytest.raises(UserError, match="is not an adapter"):
        read_adapter_config(tmp_path / "model")


def test_a_broken_adapter_is_named(tmp_path: Path) -> None:
    weights = write_adapter(tmp_path) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is truncated"):
        read_adapter_config(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no weights: adapter_model\.safetensors"):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"only as adapter_model\.bin, a pickle"):
        read_adapter_config(tmp_path)
    for base in (None, "", 3):
        write_adapter(tmp_path, base_model_name_or_path=base)
        with pytest.raises(UserError, match="base_model_name_or_path"):
            read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="malformed JSON at line 1"):
        read_adapter_config(tmp_path)


# --- fingerprints ------------------------------------------------------------------------------------------


def test_a_fingerprint_knows_the_weights_and_not_the_sharding(tmp_path: Path) -> None:
    whole = fingerprint(write_model(tmp_path / "whole"))
    assert (
        whole
        == fingerprint(write_shards(tmp_path / "two", 2))
        == fingerprint(write_shards(tmp_path / "six", 6))
    )
    for number, name in enumerate(some_tensors()):
        if some_tensors()[name].numel():
            changed = {
                n: ~t if t.dtype == torch.bool else t * (1 + (n == name)) for n, t in some_tensors().items()
            }
            assert fingerprint(write_model(tmp_path / str(number), changed)) != whole, name
    renamed = {name.replace("layer", "layes"): tensor for name, tensor in some_tensors().items()}
    reshaped = some_tensors() | {"layer.weight": some_tensors()["layer.weight"].view(1200, 8)}
    retyped = some_tensors() | {"layer.bias": some_tensors()["layer.bias"].view(torch.bfloat16)}
    for number, tensors in enumerate((renamed, reshaped, retyped)):
        assert fingerprint(write_model(tmp_path / f"other{number}", tensors)) != whole
    assert len(fingerprint(write_adapter(tmp_path / "adapter"))) == 64


# --- finding it --------------------------------------------------------------------------------------------


def test_a_folder_is_itself_and_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == Path("owner/name")
    assert locate(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my-modle", r"no such folder: my-modle; did you mean my-model\?"),
        ("./runs/firts", r"no such folder: runs/firts; did you mean runs/first\?"),
        ("nothing/like/it", "no such folder: nothing/like/it; .*owner/name"),
        ("", "name is empty"),
        ("Tell me a story. " * 100, "is not a valid path"),
        ("~nobody-of-this-name/model", "is not a valid path"),
        ("gpt2", "a hub model is written owner/name"),
        ("absent.gguf", r"absent\.gguf cannot be read \(No such file"),
        ("~nobody-of-this-name/model.gguf", "is not a valid path"),
        ("weights.bin", "never loads"),
        ("model.safetensors", "give the folder"),
        ("runs/firts", r"did you mean the folder runs/first\?"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "runs" / "first").mkdir(parents=True)
    for file in ("weights.bin", "model.safetensors"):
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=said):
        locate(name)


@pytest.mark.parametrize(
    ("name", "content"), [("m.gguf", b"GGUF"), ("M.GGUF", b"GGUF"), ("sha256-1", b"GGUF1")]
)
def test_a_gguf_file_is_told_by_its_extension_or_its_first_bytes(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    assert locate(str(tmp_path / name)) == tmp_path / name


def test_a_hub_name_offline_is_one_sentence() -> None:
    with pytest.raises(
        UserError, match=r"owner/absent is neither a local folder nor in .*HF_HUB_OFFLINE is set: unset"
    ):
        locate("owner/absent")


def test_a_hub_name_without_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(
        UserError, match=r"owner/absent .* the hub cannot be reached: check the network"
    ) as raised:
        locate("owner/absent")
    assert "\n" not in str(raised.value)


class FakeHub:
    """Stands in for `huggingface_hub.snapshot_download`: records what was asked, answers or raises."""

    def __init__(self, answer: Path | Exception, size: int = 0) -> None:
        self.answer, self.size, self.asked = answer, size, []  # type: ignore[var-annotated]

    def __call__(self, name: str, *, dry_run: bool = False, **kwargs: Any) -> Any:
        self.asked.append((name, dry_run, kwargs))
        if isinstance(self.answer, Exception):
            raise self.answer
        return [SimpleNamespace(file_size=self.size, will_download=True)] if dry_run else str(self.answer)


def ask_hub(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> Path:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return locate("owner/model")


def test_only_data_is_fetched_from_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    hub = FakeHub(tmp_path)
    assert ask_hub(monkeypatch, hub) == tmp_path
    wanted = hub.asked[-1][2]
    data = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]
    data += ["tokenizer.json", "chat_template.jinja", "adapter_model.safetensors"]
    other = [
        "pytorch_model.bin",
        "modeling_phi3.py",
        "consolidated.safetensors",
        "original/params.json",
        "x.gguf",
    ]
    assert list(filter_repo_objects(data + other, **wanted)) == data


def test_a_plan_needs_no_weights_from_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub := FakeHub(tmp_path))
    assert locate("owner/model", config_only=True) == tmp_path
    files = ["config.json", "model.safetensors", "tokenizer.json", "adapter_config.json"]
    files += ["adapter_model.safetensors", "adapter_model.bin"]
    kept = list(filter_repo_objects(files, **hub.asked[-1][2]))
    assert kept == ["config.json", "adapter_config.json", "adapter_model.safetensors"]


def test_a_download_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path, size=10**18)
    with pytest.raises(UserError, match=r"downloading owner/model needs 1000000\.0 TB"):
        ask_hub(monkeypatch, hub)
    assert [dry_run for _, dry_run, _ in hub.asked] == [True]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "is gated on the hub: accept its terms"),
        ("RepositoryNotFoundError", "neither a local folder nor a model on the hub"),
        ("HfHubHTTPError", r"could not be downloaded \(HfHubHTTPError"),
    ],
)
def test_each_refusal_of_the_hub_is_told_apart(monkeypatch: pytest.MonkeyPatch, kind: str, said: str) -> None:
    from huggingface_hub import errors

    error_class = getattr(errors, kind)
    error = error_class.__new__(error_class)  # its constructor asks for a response of the transport library
    Exception.__init__(error, "first line\nsecond line")
    with pytest.raises(UserError, match=said) as raised:
        ask_hub(monkeypatch, FakeHub(error))
    assert "\n" not in str(raised.value)


def test_the_embedded_model_is_found_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding.importlib.resources, "files", lambda package: tmp_path / package)
    with pytest.raises(UserError, match="fettle-tiny is missing from this installation"):
        locate("fettle-tiny")
    folder = tmp_path / "fettle" / "tiny" / "checkpoint"
    folder.mkdir(parents=True)
    assert locate("fettle-tiny") == folder
