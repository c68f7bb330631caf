"""The command line `fastlm`: arguments in, calls of the package, text out."""

import errno
import sys
import traceback
from collections.abc import Sequence

INTERRUPTED = 130  # what a shell reports of a process that Ctrl-C ended
EXTRA = "expected further packages, which pip install 'fastlm[lm]' installs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; every error is one line on stderr and status 2, --debug shows where it came from."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        from fastlm.cli.app import app

        return app(arguments, prog_name="fastlm", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if text := _describe(error):  # empty where the help was printed for want of arguments
            print(f"error: {text}", file=sys.stderr)
        return 2


def _describe(error: Exception) -> str:
    """One line; what Python raises by itself is named, since its message alone may say little."""
    cause = error
    while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:  # libraries wrap it in errors of their own
        error = cause
    if isinstance(error, ModuleNotFoundError):
        return f"{EXTRA}: {error}"
    if hasattr(error, "format_message"):  # typer's, about an argument
        text = error.format_message()
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif type(error) is ValueError:
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}".rstrip(": ")
    return " ".join(text.split())
