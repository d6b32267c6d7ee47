"""The process that renders chat templates, started by `fettle.data.template`, which documents reason and protocol.

It is run by its path, not imported from the package: it needs Jinja and transformers' rendering, but not torch.
"""

import json
import os
import resource
import signal
import struct
import sys
from typing import Any

import jinja2
import psutil
from transformers.utils.chat_template_utils import render_jinja_template

LONGEST_REASON = 300
"""Maximum characters of an error message, which the template chooses."""


def main(cpu_seconds: float, memory_bytes: int) -> None:
    """Serve until standard input ends.

    A forked child does the work. If a template crashes it, the next child starts at once, with all imports done.
    """
    limit = psutil.Process().memory_info().vms + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _send({"ready": True})
    while True:
        child = os.fork()
        if child == 0:
            _serve(cpu_seconds)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGPROF:  # any other end may have left half a request or reply in the pipes
            sys.exit(code)
        _send({"limit": "time"})


def _serve(cpu_seconds: float) -> None:
    while header := sys.stdin.buffer.read(8):
        (length,) = struct.unpack("<Q", header)
        request = json.loads(sys.stdin.buffer.read(length).decode("utf-8", "surrogatepass"))
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        reply = _render(request["chat"], request["longest"], request["arguments"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(reply)


def _render(chat: list[dict[str, Any]], longest: int, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        ((text,), _) = render_jinja_template(conversations=[chat], **arguments)
    except MemoryError:
        return {"limit": "memory"}
    except RecursionError:
        return {"limit": "depth"}
    except jinja2.TemplateSyntaxError as error:
        return {"syntax": _short(f"{error.message}, line {error.lineno}")}
    except (jinja2.TemplateError, TypeError) as error:
        return {"refused": _short(str(error))}
    except Exception as error:  # a template is a program and may raise anything
        return {"failed": _short(f"{type(error).__name__}: {error}")}
    return {"limit": "length"} if len(text) > longest else {"text": text}


def _short(text: str) -> str:
    """Return the beginning of an error message, which the template chooses, on one line."""
    text = " ".join(text[:1000].split())
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " ..."


def _send(reply: dict[str, Any]) -> None:
    data = json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(struct.pack("<Q", len(data)) + data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
