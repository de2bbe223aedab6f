"""Renders a chat template that nobody has proven: jinja2's sandbox inside a limited child process.

Knows the names that templates on the hub rely on, and the limits on time, memory and output.
Leaves it to `tokenizer` to use it only where `chat_template` has no renderer of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm5.errors import TemplateError

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])
# Neither the caller's working directory nor PYTHON* variables reach the child (-I), so it cannot
# be led to import anything but what is installed beside this package.
_CHILD = (
    f"import sys; sys.path.insert(0, {_PACKAGE_PARENT!r}); "
    "from glm5.text.chat.sandbox import child_main; child_main()"
)


@dataclass(frozen=True)
class Limits:
    """What one rendering may use. Memory is on top of what the child needs to start."""

    seconds: float = 5.0
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 8 * 2**20


DEFAULT_LIMITS = Limits()


def render_unknown(
    template: str,
    variables: Mapping[str, Any],
    *,
    source: str = "chat_template.jinja",
    limits: Limits = DEFAULT_LIMITS,
) -> str:
    """Render `template` with `variables` (JSON values) in a child process, and return its text.

    `ImmutableSandboxedEnvironment` keeps a template from Python's internals, but not from
    endless loops or `'a' * 10**9`: those end at `limits`, in a process that is then killed. On
    systems without POSIX limits only the time and the output are bounded. Starting the child
    costs about a tenth of a second. Raises TemplateError, one line that begins with `source`.
    """
    try:
        request = json.dumps({"template": template, "variables": dict(variables), "limits": asdict(limits)})
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"{source}: messages or tools are not JSON: {error}") from None
    with subprocess.Popen(
        [sys.executable, "-I", "-X", "utf8", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={key: os.environ[key] for key in ("SYSTEMROOT", "LANG") if key in os.environ},
        cwd=os.path.abspath(os.sep),
    ) as child:
        try:
            answer, _ = child.communicate(request.encode("ascii"), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            raise TemplateError(_too_slow(source, limits)) from None
        finally:
            # Also when the caller is interrupted: no template outlives its request.
            child.kill()
    if child.returncode != 0:
        if child.returncode == -_signal_number("SIGXCPU"):
            raise TemplateError(_too_slow(source, limits))
        raise TemplateError(f"{source}: the template crashed its sandbox ({child.returncode})")
    reply = json.loads(answer)
    if "error" in reply:
        raise TemplateError(f"{source}: {reply['error']}")
    text = reply["text"]
    assert isinstance(text, str)
    return text


def _too_slow(source: str, limits: Limits) -> str:
    return f"{source}: the template ran longer than {limits.seconds:g} s and was stopped"


def _signal_number(name: str) -> int:
    import signal

    return int(getattr(signal, name, 0))


def child_main() -> None:
    """Entry point of the child: one JSON request on stdin, one JSON reply on stdout."""
    request = json.load(sys.stdin)
    limits = Limits(**request["limits"])
    import jinja2.sandbox  # noqa: F401  before the limits: its size is not the template's

    try:
        _confine(limits)
        reply = {"text": _render(request["template"], request["variables"], limits)}
    except MemoryError:
        reply = {"error": f"the template needs more than {limits.memory_bytes >> 20} MiB"}
    except BaseException as error:
        reply = {"error": _describe(error)}
    sys.stdout.write(json.dumps(reply))
    sys.stdout.flush()
    os._exit(0)  # a template's leftovers need no tidy shutdown


def _confine(limits: Limits) -> None:
    """Let the kernel hold this process to its limits, and keep it from files and processes."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock is the only limit
        return
    cpu = max(1, math.ceil(limits.seconds))
    wanted = {
        "RLIMIT_CPU": (cpu, cpu + 1),
        "RLIMIT_FSIZE": (0, 0),
        "RLIMIT_NPROC": (0, 0),
        "RLIMIT_CORE": (0, 0),
    }
    baseline = _address_space()
    if baseline is not None:
        wanted["RLIMIT_AS"] = (baseline + limits.memory_bytes,) * 2
    for name, (soft, hard) in wanted.items():
        # Some systems lack a limit or refuse to lower it; the others and the clock remain.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            number = getattr(resource, name)
            _, ceiling = resource.getrlimit(number)
            if ceiling != resource.RLIM_INFINITY:
                soft, hard = min(soft, ceiling), min(hard, ceiling)
            resource.setrlimit(number, (soft, hard))


def _address_space() -> int | None:
    """Bytes of address space in use now, or None where /proc does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _render(source: str, variables: dict[str, Any], limits: Limits) -> str:
    template = _environment().from_string(source)
    pieces: list[str] = []
    written = 0
    for piece in template.generate(**variables):
        written += len(piece.encode("utf-8", "surrogatepass"))
        if written > limits.output_bytes:
            raise _LimitError(f"the template wrote more than {limits.output_bytes >> 20} MiB")
        pieces.append(piece)
    return "".join(pieces)


def _environment() -> Any:
    """The environment that transformers gives chat templates, without a loader."""
    from datetime import datetime

    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(Extension):
        """`{% generation %}` marks what a model writes; it changes nothing in the text."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: Any) -> None:
        raise jinja2.exceptions.TemplateError(str(message))

    class Sandbox(ImmutableSandboxedEnvironment):
        """Says so at once when a template reaches for internals; jinja2 waits for a use."""

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is unsafe")

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _LimitError(Exception):
    """A limit met inside the child, already in words for the user."""


def _describe(error: BaseException) -> str:
    """One line for the user: what went wrong, and the template's line where jinja2 knows it."""
    from jinja2 import TemplateSyntaxError

    message = " ".join(str(error).split())[:300]
    if isinstance(error, _LimitError):
        return message
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {message}"
    line = _template_line(error)
    where = f"line {line}: " if line else ""
    return f"{where}{message or type(error).__name__}"


def _template_line(error: BaseException) -> int | None:
    """The last template line in the traceback, which jinja2 rewrites to template lines."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
