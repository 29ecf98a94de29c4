"""Results as tables on stdout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from laconic.cli.progress import wide_console

if TYPE_CHECKING:
    from laconic.diff import Diff
    from laconic.explain import Explanation
    from laconic.passes.base import Pass
    from laconic.passes.instruments import Timing
    from laconic.passes.ledger import Ledger, Sizes

#: So many places of a rule are named; the rest is counted.
_PLACES = 5


def console() -> Console:
    """Stdout; as wide as the terminal, else wide enough for a ledger."""
    return wide_console(stderr=False)


def print_table(table: Table) -> None:
    console().print(table)


def _table(title: str, columns: Sequence[str], numeric: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in numeric else "left")
    return table


def passes_table(kinds: Sequence[type[Pass]]) -> Table:
    from laconic.passes.pipeline import options_of

    table = _table("", ["pass", "contract", "needs", "reads values", "what it does", "options"])
    for kind in kinds:
        options = ", ".join(f"{k}={_yes(d)}" for k, (_, d) in options_of(kind).items())
        table.add_row(kind.name, kind().contract, kind().needs, _yes(kind().reads_values), kind.summary, options)
    return table


def _yes(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def ledger_table(ledger: Ledger) -> Table:
    """A row per pass: what it did and the sizes after it."""
    metrics = list(ledger.before.metrics)
    numeric = ["nodes", "weight bytes", "max-abs", *metrics, "seconds"]
    table = _table(f"{ledger.model}: {ledger.pipeline or '(no pass)'}", ["pass", "contract", "did", *numeric], numeric)

    def sizes(found: Sizes) -> list[str]:
        return [*_sizes(found), *(f"{found.metrics[name]:.4g}" for name in metrics)]

    table.add_row("captured", "", "", *sizes(ledger.before), "")
    for row in ledger.rows:
        did = row.reason if row.modified or row.skipped else f"nothing: {row.reason}"
        table.add_row(row.spec, row.contract, did, *sizes(row.after), f"{row.seconds:.3f}")
    return table


def times_table(timing: Timing) -> Table:
    """Seconds of each pass by phase, and its share of the whole run."""
    from laconic.passes.manager import Phase

    numeric = [*(str(phase) for phase in Phase), "total", "share"]
    table = _table("seconds", ["pass", *numeric], numeric)
    for row in timing.rows:
        table.add_row(row.name, *(f"{row.phases[phase]:.4f}" for phase in Phase), *_share(row.total, timing.wall))
    blank = [""] * len(Phase)
    rest = timing.wall - sum(row.total for row in timing.rows)
    table.add_row("ledger and instruments", *blank, *_share(rest, timing.wall))
    table.add_row("all", *blank, *_share(timing.wall, timing.wall))
    return table


def _share(seconds: float, whole: float) -> tuple[str, str]:
    return f"{seconds:.4f}", f"{seconds / whole:.1%}"


def _sizes(sizes: Sizes) -> tuple[str, str, str]:
    gap = "" if sizes.max_abs is None else f"{sizes.max_abs:.3g}"
    return f"{sizes.nodes:,}", f"{sizes.weight_bytes:,}", gap


def ledger_report(ledger: Ledger) -> None:
    print_table(ledger_table(ledger))
    cases = f"checked on {len(ledger.checked)} inputs" if ledger.checked else "contracts not checked"
    console().print(f"{'verified' if ledger.verified else 'UNVERIFIED'}; {cases}")


def evaluation_report(data: dict[str, Any]) -> None:
    title = data["model"] + (f" against {data['against']}" if data["against"] else "")
    columns = ["input", *data["columns"]]
    table = _table(title, columns, columns[1:])
    for row in data["rows"]:
        table.add_row(row["input"], *(_cell(row, column) for column in data["columns"]))
    print_table(table)


def _cell(row: dict[str, Any], column: str) -> str:
    if row[column] is None:
        return ""
    edges = [row[f"{column} {edge}"] for edge in ("low", "high") if f"{column} {edge}" in row]
    return f"{row[column]:.4g}" + (f" [{', '.join(f'{edge:.4g}' for edge in edges)}]" if edges else "")


def figures_report(data: dict[str, Any]) -> None:
    """A line per metric; intervals hold 95 % of the bootstrap draws."""
    columns = ["metric", "value", "over", *(["against", "difference"] if data["against"] else [])]
    title = data["model"] + (f" against {data['against']}" if data["against"] else "") + f", on {data['data']}"
    table = _table(title, columns, columns[1:])
    for row in data["figures"]:
        cells = [row["metric"], _figure(row), f"{row['units']} units"]
        if data["against"]:
            cells += [_figure(row[part]) if part in row else "" for part in ("against", "difference")]
        table.add_row(*cells)
    print_table(table)


def _figure(row: dict[str, Any]) -> str:
    return f"{row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"


def bisect_report(data: dict[str, Any]) -> None:
    """What was tried, and what was found."""
    table = _table(f"{data['model']}, {data['pipeline']}", ["candidate", "verdict", "measured"], ["measured"])
    for trial in data["trials"]:
        measured = trial["measured"]
        table.add_row(trial["candidate"], trial["verdict"], "" if measured is None else f"{measured:.6g}")
    print_table(table)
    for line in _finding(data):
        console().print(line, soft_wrap=True, markup=False)


def _finding(data: dict[str, Any]) -> Iterator[str]:
    if data["culprit"] is None:
        yield "nothing found: the model is good with all passes"
        return
    yield f"the first bad pass is number {data['position']}, {data['culprit']}"
    said = ", ".join(f"{key} {value}" for key, value in data["action"].items())
    yield f"its first bad action is number {data['actions']}: {said}"
    if data["partner"] is not None:
        yield f"alone it is good; with {data['partner']} it is bad"
    elif not data["alone"]:
        yield "alone it is good; it takes several of the passes before it"


def export_report(data: dict[str, Any]) -> None:
    for path in data.get("paths", [data["path"]]):
        console().print(f"{path} is written and checked", soft_wrap=True)
    said = ["opset", "ir_version", "nodes", *(["functions", "calls", "stored_nodes"] if data.get("functions") else [])]
    shown = {k: v for k, v in data.items() if k in (*said, "bytes", "checks")}
    for key, value in shown.items():
        console().print(f"  {key}: {value}", soft_wrap=True)


def diff_report(before: str, after: str, diff: Diff) -> None:
    """A block per part; a line that changed is shown as it was and as it is."""
    out = console()
    out.print(f"{before} -> {after}", markup=False, soft_wrap=True)
    if diff.equal:
        out.print("no difference")
        return
    nodes, weights = zip(diff.before, diff.after, strict=True)
    out.print(f"nodes {nodes[0]:,} -> {nodes[1]:,}, weight bytes {weights[0]:,} -> {weights[1]:,}")
    for section in diff.sections:
        out.print(Text(f"\n{section.name}", style="bold"))
        for change in section.changes:
            lines = [("- ", change.before, "red"), ("+ ", change.after, "green")]
            shown = [Text(mark + line, style=style) for mark, line, style in lines if line is not None]
            if change.note:
                shown[-1].append(f"    ({change.note})", style="dim")
            for line in shown:
                out.print(line, soft_wrap=True)


def explain_report(found: Explanation) -> None:
    """The recipe, then each pass with what it cost and where it did what."""
    out = console()
    recipe, versions = found.recipe, found.recipe.get("versions") or {}
    verified = "verified" if recipe["verified"] else "UNVERIFIED: written with checks switched off"
    damaged = ", ".join(f"{name} {found.files[name]}" for name in found.damaged)
    files = ", ".join(f"{name} {state}" for name, state in found.files.items())
    for name, text in (
        ("model", recipe.get("model")),
        ("pipeline", recipe.get("pipeline")),
        ("made by", ", ".join(f"{package} {version}" for package, version in versions.items())),
        ("state", f"DAMAGED: {damaged}; as it was written: {verified}" if damaged else verified),
        ("files", files),
        ("checked on", ", ".join(found.ledger.checked) or "no inputs"),
        ("problem", found.problem),
    ):
        if text:
            out.print(f"{name + ':':12}{text}", markup=False, soft_wrap=True)
    for number, report in enumerate(found.passes, start=1):
        row = report.row
        head = f"\n{number}. {row.spec} ({row.contract}, {row.seconds:.3f} s): "
        head += _effect(report.before, row.after) if row.modified else row.reason
        out.print(Text(head), soft_wrap=True)
        for rule, places in report.rules.items():
            out.print(Text(f"   {sum(p.count for p in places)} {rule}"), soft_wrap=True)
            for place in places[:_PLACES]:
                times = f" x {place.count}" if place.count > 1 else ""
                out.print(Text(f"      {' '.join(filter(None, (place.name, place.source)))}{times}"), soft_wrap=True)
            if len(places) > _PLACES:
                out.print(f"      and {len(places) - _PLACES} more places: --pass {number}")


def actions_report(actions: Sequence[dict[str, Any]]) -> None:
    """A line per action: the rule, where, and the rest of it."""
    for action in actions:
        rest = ", ".join(f"{k} {v}" for k, v in action.items() if k not in ("rule", "place", "site"))
        place = "" if action.get("site") is None else f"    ({action['place']})"
        console().print(Text(f"{action['rule']}: {rest}{place}"), soft_wrap=True)


def _effect(before: Sizes, after: Sizes) -> str:
    found = f"nodes {before.nodes:,} -> {after.nodes:,}, weight bytes {before.weight_bytes:,} -> {after.weight_bytes:,}"
    return found if after.max_abs is None else f"{found}, max-abs {after.max_abs:.3g} from the captured model"


def bench_report(data: dict[str, Any]) -> None:
    """A row per way: milliseconds, and how long the model took over it."""
    numeric = ["median ms", "quartiles", "ratio", "interval"]
    table = _table(f"{data['model']} on {data['input']}", ["way", *numeric], numeric)
    for name, ms in data["milliseconds"].items():
        ratio = data["ratio"].get(name)
        shown = ["", ""] if ratio is None else [f"{ratio['median']:.3f}", f"{ratio['low']:.3f} to {ratio['high']:.3f}"]
        table.add_row(name, f"{ms['median']:.3f}", f"{ms['low']:.3f} to {ms['high']:.3f}", *shown)
    print_table(table)
    if data["compile"]:
        print_table(_compile_table(data["compile"]))
    machine = data["machine"]
    console().print(
        f"ratio: laconic over the other, {data['repeats']} turns, interval of 95 %; {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}",
        soft_wrap=True,
    )


def _compile_table(compiling: dict[str, Any]) -> Any:
    """A row per compiler: seconds to the first result, and whether its gradients are right."""
    numeric = ["CPU s to first result", "wall s", "CPU s, training step", "gradient error"]
    table = _table("Compiling, in a process of its own", ["way", *numeric, "gradients"], numeric)
    for way, found in compiling.items():
        first, step = found["inference"], found["training"]
        seconds = [f"{first[key]:.1f}" if key in first else "failed" for key in ("cpu_seconds", "wall_seconds")]
        if "problem" in step:
            table.add_row(way, *seconds, "failed", "", step["problem"])
        else:
            right = "right" if step["gradients_right"] else f"WRONG at {step['gradient_error_at']}"
            table.add_row(way, *seconds, f"{step['cpu_seconds']:.1f}", f"{step['gradient_error']:.1g}", right)
    return table


def doctor_report(found: dict[str, Any]) -> None:
    table = _table("", ["part", "found", "what follows"])
    for part in found["parts"]:
        mark = {"ok": "", "missing": "not found", "problem": "PROBLEM: "}[part["status"]]
        table.add_row(part["name"], f"{mark}{part['found']}", part["follows"])
    print_table(table)
