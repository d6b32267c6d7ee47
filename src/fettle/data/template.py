"""Chat templates are untrusted programs: they are rendered in a separate process with limits on CPU time and memory.

A checkpoint or GGUF file ships its chat template, and transformers renders it in Jinja's sandbox. The sandbox keeps a
template away from files and Python's internals, but it does not stop endless loops, deep recursion or strings of many
gigabytes, and no thread of the same process can interrupt a single string multiplication. So another process renders
templates (`template_worker.py`), with transformers' own function: the kernel kills it at a limit of CPU time and
refuses it memory beyond a limit.

The process starts with the first tokenizer that has a template, serves all later ones and ends with the program.
Requests and replies go over pipes: a length in eight bytes, then JSON. A template that exceeds a limit once is not run
again.
"""

import atexit
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from fettle.data.tokenizer import Tokenizer
from fettle.errors import ModelFault, UserError

CPU_SECONDS = 5.0
"""Per rendering. Chats of 100,000 tokens take hundredths of a second."""

MEMORY_BYTES = 2**30
"""Address space beyond what the process has when it starts."""

LONGEST_TEXT = 1_000_000
EXPANSION = 20
"""A rendering may have LONGEST_TEXT characters plus EXPANSION per character of the chat."""

_LIMITS = {
    "memory": f"it needs more than {MEMORY_BYTES // 2**30} GiB of memory",
    "depth": "it recurses or nests too deeply",
    "length": f"it writes more than {LONGEST_TEXT:,} characters plus {EXPANSION} per character of the chat",
    "time": f"it takes more than {CPU_SECONDS:.0f} seconds of CPU time",
}


def render_template(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    *,
    for_generation: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    """Return what `tokenizer.apply_chat_template(messages, tokenize=False, tools=tools or None)` returns.

    for_generation: end where the assistant's answer begins. Raises ModelFault for a template that exceeds a limit
    or is not valid Jinja, and UserError with the template's own message if it refuses the chat.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path} has no chat template.")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several named templates without a default
        raise ModelFault(f"{_source(tokenizer)}: {str(error).splitlines()[0]}") from None
    # As apply_chat_template does: an entry that is null counts as absent.
    chat = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    if not isinstance(template, str):
        raise ModelFault(
            f"{_source(tokenizer)}: the chat template is {type(template).__name__}, expected text."
        )
    arguments = {"add_generation_prompt": for_generation, **tokenizer.special_tokens_map}
    reply = _renderer.render(template, chat, arguments | ({"tools": list(tools)} if tools else {}))
    if "text" in reply:
        return _encodable(str(reply["text"]), tokenizer)
    if "refused" in reply:
        raise UserError(
            f'the model\'s chat template refuses this chat: "{reply["refused"]}"; change or remove this chat.'
        )
    source = _source(tokenizer)
    if "failed" in reply:
        raise UserError(
            f"{source}: the chat template fails on this chat ({reply['failed']}); change or remove this chat."
        )
    if "syntax" in reply:
        raise ModelFault(
            f"{source}: the chat template is not valid Jinja ({reply['syntax']}); fix it or fetch the file again."
        )
    reason = _LIMITS.get(reply["limit"], f"it crashed the process that renders it ({reply['limit']})")
    raise ModelFault(
        f"{source}: the chat template was stopped because, on one chat, {reason}; fix it or fetch the file again."
    )


def start_renderer() -> None:
    """Start the process now, so that its imports, about a second, overlap with the caller's work."""
    with _renderer.lock:
        _renderer.start()


def note_source(template: str, source: str) -> None:
    """Say where a template comes from that is not in the tokenizer's own folder; errors then name that place."""
    _noted_sources[template] = source


def _encodable(text: str, tokenizer: Tokenizer) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ModelFault(
            f"{_source(tokenizer)}: the chat template writes a lone surrogate, which is not valid text: fix it "
            "or fetch the file again."
        ) from None
    return text


def _source(tokenizer: Tokenizer) -> str:
    """Return the file that the template came from, as far as the tokenizer knows."""
    if (noted := _noted_sources.get(str(tokenizer.chat_template))) is not None:
        return noted
    place = Path(tokenizer.name_or_path)
    for file in (place / "chat_template.jinja", place / "tokenizer_config.json"):
        if file.is_file():
            return str(file)
    return str(place)


class _Renderer:
    """The process and the pipes to it; restarted after a template has crashed it, and after a fork."""

    def __init__(self) -> None:
        self.lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner, self._is_ready = 0, False
        self._faults: dict[str, dict[str, Any]] = {}
        atexit.register(self.close)

    def render(self, template: str, chat: list[dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the process's reply: {"text": ...}, or the reason why there is none."""
        arguments = {"chat_template": template, **arguments}
        try:
            words = json.dumps(chat, ensure_ascii=False, default=_placeholder)
        except (ValueError, RecursionError):  # a number of thousands of digits, lists a thousand deep
            return {"refused": "a number or a nested list in it is too large"}
        longest = LONGEST_TEXT + EXPANSION * len(words)
        head = json.dumps({"longest": longest, "arguments": arguments}, ensure_ascii=False)
        request = f'{head[:-1]}, "chat": {words}}}'.encode("utf-8", "surrogatepass")
        with self.lock:
            if (reply := self._faults.get(template)) is None:
                reply = self._ask(request)
                if "limit" in reply:
                    self._faults[template] = reply
        return reply

    def _ask(self, request: bytes) -> dict[str, Any]:
        process = self.start()
        assert process.stdin and process.stdout
        try:
            if not self._is_ready and _receive(process.stdout) is None:
                raise RuntimeError(
                    f"the process that renders chat templates did not start ({process.wait()})"
                )
            self._is_ready = True
            process.stdin.write(struct.pack("<Q", len(request)) + request)
            process.stdin.flush()
            reply = _receive(process.stdout)
        except BrokenPipeError:
            reply = None
        except BaseException:  # Ctrl-C: the pending reply must not be read as the answer to the next request
            self.close()
            raise
        if reply is not None:
            return reply
        code = process.wait()
        self.close()
        return {"limit": f"exit code {code}"}

    def start(self) -> "subprocess.Popen[bytes]":
        """Return the process, started if there is none."""
        if self._process is None or self._owner != os.getpid():
            worker = Path(__file__).with_name("template_worker.py")
            # -P keeps the worker's folder out of its import path. A new session keeps Ctrl-C from reaching it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", str(worker), str(CPU_SECONDS), str(MEMORY_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._owner, self._is_ready = os.getpid(), False
        return self._process

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and the child that does its work
        process.communicate()


def _receive(stream: Any) -> dict[str, Any] | None:
    """Return the next reply; None if the process has ended instead."""
    header = stream.read(8)
    if len(header) < 8:
        return None
    (length,) = struct.unpack("<Q", header)
    data = stream.read(length)
    if len(data) < length:
        return None
    reply: dict[str, Any] = json.loads(data.decode("utf-8", "surrogatepass"))
    return reply


def _placeholder(value: object) -> str:
    """Return what a template sees in place of a value that JSON cannot represent, such as a date."""
    return f"<{type(value).__name__}>"


_noted_sources: dict[str, str] = {}
_renderer = _Renderer()
