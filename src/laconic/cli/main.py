"""The entry point: commands, and how every failure ends (one screen on stderr, an exit code)."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from laconic.cli import audit, bench, bisect, diff, doctor, evaluate, explain, export, optimize, passes
from laconic.ir.errors import LaconicError
from laconic.version import __version__

#: The base of all usage errors of the command line's library, which carries a copy of click in its newer versions.
_ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="laconic",
    help="A compiler for neural networks that says the same with less.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 1 failure, 2 usage, 3 verification or budget not met, 4 model not supported, "
    "5 optional dependency missing, 130 interrupted.",
)
app.command("passes")(passes.passes)
app.command("optimize")(optimize.optimize)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("audit")(audit.audit)
app.command("bisect")(bisect.bisect)
app.command("bench")(bench.bench)
app.command("diff")(diff.diff)
app.command("explain")(explain.explain)
app.command("doctor")(doctor.doctor)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """A compiler for neural networks that says the same with less."""


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code: Any = app(arguments, prog_name="laconic", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except LaconicError as problem:
        typer.echo(f"laconic: {problem.render()}", err=True)
        return problem.exit_code
    except _ClickException as problem:
        if type(problem).__name__ == "NoArgsIsHelpError":
            typer.echo(problem.ctx.get_help())
        else:
            problem.show()
        return int(problem.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("laconic: interrupted, nothing was left half-written", err=True)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; say nothing more, also not while Python shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        typer.echo(
            "laconic: out of memory\n  next: a smaller batch or sequence, or a machine with more memory", err=True
        )
        return 1
    except OSError as problem:
        typer.echo(f"laconic: {problem.strerror or problem}\n  where: {problem.filename or ''}", err=True)
        return 1
