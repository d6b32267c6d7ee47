"""For the documentation site: an option's help, which is in the metadata of its field, becomes its docstring.

Read by Griffe from the source text, as `zensical.toml` says; nothing of fettle is imported.
"""

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension


class OptionHelp(Extension):
    """Reads `name: type = _option("help", default)` and `name: type = field(metadata={"help": "help"})`."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **_: Any) -> None:
        """Give `attr` a docstring and its true default."""
        value = getattr(node, "value", None)
        if attr.docstring is not None or not isinstance(value, ast.Call):
            return
        function = ast.unparse(value.func)
        if function == "_option":
            words, default = value.args[0], (value.args[1] if len(value.args) > 1 else ast.Constant(None))
        elif function in ("field", "dataclasses.field") and (found := _help_of(value)) is not None:
            words, default = found, None
        else:
            return
        attr.docstring = Docstring(_sentence(ast.literal_eval(words)), parent=attr)
        attr.value = None if default is None else ast.unparse(default)


def _help_of(call: ast.Call) -> ast.expr | None:
    metadata = next((word.value for word in call.keywords if word.arg == "metadata"), None)
    if not isinstance(metadata, ast.Dict):
        return None
    pairs = zip(metadata.keys, metadata.values, strict=True)
    return next((value for key, value in pairs if key is not None and ast.literal_eval(key) == "help"), None)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."
