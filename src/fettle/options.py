"""Command-line options and YAML config files, both generated from one dataclass per command.

    @dataclass(kw_only=True, slots=True)
    class TrainOptions:
        model: str = field(metadata={"help": "checkpoint folder or hub name"})
        rank: int = field(default=16, metadata={"help": "width of the adapters"})

gives `--model` and `--rank`, a file with `model:` and `rank:`, and a statically typed object.
Command-line options override the `--config` file, which overrides the defaults.

Both sources are text, so both go through the same converter and follow the same rules. The YAML is therefore
read as a tree of nodes, never as Python objects: `2e-4` is a number (PyYAML alone would read it as text), `no`
stays text if text is expected, every error names the line of the file, and no YAML tag can run code.

Types: str, int, float, bool, Literal, list[str], and any of these with `| None`.
"""

import argparse
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from fettle import terminal
from fettle.errors import UserError, option
from fettle.files import write_aside

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

# PyYAML's time grows with the square of the depth; options need a depth of one.
_MAX_FILE_CHARACTERS, _MAX_DEPTH = 2**20, 50
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_METAVARS = {str: "TEXT", int: "N", float: "X"}


# ---- command-line options from a dataclass ------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one sentence and exits with code 2.

    Options must be spelled out: an abbreviation could become ambiguous when an option is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        # -5GB is a value too; its option rejects it
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but reject unknown options here, where the subcommand is known."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._describe_unknown(unknown))
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Print `fettle: error: ...` on standard error and exit with code 2."""
        invalid = re.fullmatch(
            r"argument (.*): invalid choice: '(.*)' \(choose from (.*)\)", message, flags=re.DOTALL
        )
        if invalid:  # an unknown command, or an invalid value of an option
            known = invalid[3].replace("'", "").split(", ")
            of_what = f"{invalid[1]}: " if invalid[1].startswith("-") else ""
            near = _did_you_mean(invalid[2], known)
            message = f"{of_what}expected {_one_of(known)}, found {invalid[2]!r}{near}"
        terminal.print_message(f"fettle: error: {message}; see {self.prog} --help")
        sys.exit(2)

    def _describe_unknown(self, unknown: list[str]) -> str:
        option = next((text for text in unknown if text.startswith("-")), None)
        if option is None:
            return f"unexpected {' '.join(unknown)!r}: a value must follow its option"
        name = option.split("=")[0]
        return f"unknown option {name}{_did_you_mean(name, self._option_string_actions)}"


def add_options(parser: argparse.ArgumentParser, options: type["DataclassInstance"]) -> None:
    """Add a `--kebab-case` flag for each field of `options`, and `--config`.

    The parsed namespace contains only the options given, so that `resolve` can let them override the file.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=argparse.SUPPRESS,
        help="YAML file with any of these options, such as rank: 16; command-line options override it",
    )
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        parser.add_argument(
            flag(field.name), default=argparse.SUPPRESS, help=_help(field), **_argument(hints[field.name])
        )


def _argument(hint: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a value of type `hint`."""
    kind = _required_type(hint)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind == list[str]:
        return {"action": "extend", "nargs": "+", "metavar": "TEXT"}
    if get_origin(kind) is Literal:
        metavar = "{" + ",".join(map(str, get_args(kind))) + "}"
    else:
        metavar = _METAVARS[kind]

    def convert(text: str) -> Any:
        try:
            return _convert(text, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return {"type": convert, "metavar": metavar}


def _help(field: "dataclasses.Field[Any]") -> str:
    text = field.metadata.get("help", "")
    if _is_required(field):
        return _escape_percent(f"{text} (required)".strip())
    default = field.default_factory() if callable(field.default_factory) else field.default
    if default is None:  # the help text describes the default
        return _escape_percent(text)
    shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
    shown = " ".join(shown) if isinstance(shown, list) else shown
    return _escape_percent(f"{text} (default: {shown})".strip())


def _escape_percent(text: str) -> str:
    return text.replace("%", "%%")  # argparse formats help with the % operator


# ---- the dataclass from the command line and a file ------------------------------------------------------


def resolve(options: type[T], typed: Mapping[str, Any], config_file: Path | None) -> T:
    """Return `options` with values from `typed`, else from `config_file`, else its defaults.

    typed: a parsed namespace as a dict; names that are not fields of `options` (the command, `config`) are
    ignored. Relative paths in the file stay as written. Raises UserError if the file is missing, malformed or
    not a mapping, for an unknown or duplicate key, a value of the wrong type, and a missing required option.
    """
    values = {} if config_file is None else _read_file(options, Path(config_file))
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in typed:
            values[field.name] = _check_typed(field.name, typed[field.name], hints[field.name])
    missing = [
        option(f.name) for f in dataclasses.fields(options) if _is_required(f) and f.name not in values
    ]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"{_all_of(missing)} {verb} required, on the command line or in the {option('config')} file."
        )
    return options(**values)


def read(options: type[T], path: Path) -> T:
    """Return the options in the file at `path`, as `write` wrote them. Raises UserError as `resolve` does."""
    return resolve(options, {}, path)


def write(options: "DataclassInstance", path: Path, comment: str = "All options of this run.") -> None:
    """Write every option to a YAML file from which `read` or `--config` restores an equal object.

    The write is atomic.
    """
    header = "".join(f"# {line}\n" for line in comment.splitlines())
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    with write_aside(Path(path), replace=True) as aside:
        aside.write_text(header + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf-8")


def _check_typed(name: str, value: Any, hint: Any) -> Any:
    kind = _required_type(hint)
    if value is None and kind is not hint:
        return None
    try:
        return _convert(value, kind)
    except ValueError as error:
        raise UserError(f"{option(name)}: {error}.") from None


def _read_file(options: type["DataclassInstance"], path: Path) -> dict[str, Any]:
    """Return the values in the YAML file at `path`, converted to the types of `options`."""
    values: dict[str, Any] = {}
    hints = get_type_hints(options)
    for key, node in _mapping(path):
        line = f"{path}, line {key.start_mark.line + 1}"
        name = str(key.value).replace("-", "_")
        if name not in hints:
            raise UserError(f"{line}: unknown option {_name(key)}{_did_you_mean(name, hints)}.")
        if name in values:
            raise UserError(f"{line}: {name!r} is set twice; remove one of the two.")
        try:
            values[name] = _convert_node(node, hints[name])
        except ValueError as error:
            raise UserError(f"{line}: {name}: {error}.") from None
    return values


def _mapping(path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the (key, value) nodes of the YAML mapping in the file at `path`."""
    expected = "expected lines such as `rank: 16`"
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_MAX_FILE_CHARACTERS + 1)
        if len(text) > _MAX_FILE_CHARACTERS or _depth(text) > _MAX_DEPTH:
            raise UserError(
                f"{path} is too long or too deeply nested for a YAML file of options; {expected}."
            )
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{option('config')}: cannot read {path}: {error.strerror}.") from None
    except yaml.MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{at}: this is not valid YAML ({error.problem}); {expected}.") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError):
        raise UserError(f"{path} is not a text file in YAML; {expected}.") from None
    if root is None:
        raise UserError(f"{path} contains no options; {expected}.")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}, line {root.start_mark.line + 1}: found {_name(root)}; {expected}.")
    return root.value


def _depth(text: str) -> int:
    """The nesting depth of brackets, including those in quotes."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _convert_node(node: yaml.Node, hint: Any) -> Any:
    """Return the value of a YAML node as the type `hint`. Raises ValueError stating what was expected and found."""
    kind = _required_type(hint)
    if node.tag == "tag:yaml.org,2002:null":
        if kind is not hint:
            return None
        raise ValueError(f"expected {_expected(kind)}, found nothing")
    if isinstance(node, yaml.ScalarNode):
        return _convert([node.value] if kind == list[str] else node.value, kind)
    items = node.value if isinstance(node, yaml.SequenceNode) else None
    if kind == list[str] and items is not None and all(isinstance(item, yaml.ScalarNode) for item in items):
        return [item.value for item in items]
    raise ValueError(f"expected {_expected(kind)}, found {_name(node)}")


def _convert(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`: text is parsed, a value of the right type is returned unchanged.

    Raises ValueError stating what was expected and what was found.
    """
    if isinstance(value, str):
        try:
            return _from_text(value, kind)
        except ValueError:
            pass
    elif _has_type(value, kind):
        return float(value) if kind is float else value
    near = _did_you_mean(str(value), map(str, get_args(kind))) if get_origin(kind) is Literal else ""
    raise ValueError(f"expected {_expected(kind)}, found {value!r}{near}")


def _from_text(text: str, kind: Any) -> Any:
    """Return `text` read as a str, int, float, bool or Literal. Raises ValueError if it is not one."""
    if kind is str:
        return text
    if kind is bool and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    if kind is int:
        return int(text)
    if kind is float and math.isfinite(float(text)):
        return float(text)
    for choice in get_args(kind):
        if text == str(choice):
            return choice
    raise ValueError(text)


def _has_type(value: Any, kind: Any) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool) or kind is bool:  # in Python True is an int; here it is not
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind)


# ---- wording -------------------------------------------------------------------------------------------------


def _required_type(hint: Any) -> Any:
    """Return X for `X | None`, and any other type as it is."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    return hint


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def flag(name: str) -> str:
    """Return how an option is named on the command line: max_length is --max-length."""
    return "--" + name.replace("_", "-")


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return _one_of(map(str, get_args(kind)))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind, "a list of text values")


def _name(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _one_of(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _all_of(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""
