"""`laconic audit`: the structure found, the redundancy found, the saving estimated; nothing is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from laconic.cli.options import (
    Batch,
    Force,
    Json,
    Model,
    NoProgress,
    Quiet,
    Threads,
    Tokenizer,
    Verbose,
    assignments,
    display,
    print_json,
    refuse_early,
)
from laconic.processes import joined

_SHOWN = 8


def audit(
    model: Model,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="D",
            help="Data to run on, to say what is redundant: zoo:NAME[:SPLIT], "
            "a .jsonl or .txt, a .safetensors or .npz, a folder of images, module:callable.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="F", help="Also write a page with heat maps, in one file.")
    ] = None,
    axes: Annotated[
        bool,
        typer.Option("--axes", help="Also say which axes of weights are one, and which may be permuted or left out."),
    ] = False,
    size: Annotated[
        str, typer.Option("--size", help="Sizes other than the example's, e.g. batch=4,sequence=128.")
    ] = "",
    tokenizer: Tokenizer = None,
    batch: Batch = 8,
    force: Force = False,
    json: Json = False,
    threads: Threads = 0,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    no_progress: NoProgress = False,
) -> None:
    """Say what a model is made of, what it says twice and what could be saved.

    Under torchrun the processes share the calibration data.
    """
    sizes = assignments(size, "--size")
    if html is not None:
        refuse_early(html, force)
    with joined() as speaks, display(quiet or not speaks, verbose, no_progress, threads) as shown:
        from laconic.auditing import audit_program
        from laconic.sources import opened

        program, folder = opened(model, shown.stage)
        data, calibrating = None, {}
        if calibration is not None:
            from laconic.data.load import load_data

            data = load_data(calibration, program, folder=tokenizer or folder, split="calibration", batch=batch)
            calibrating = {"calibrating": shown.counted(f"calibrating on {data.name}")}
        found = audit_program(program, sizes=sizes, calibration=data, axes=axes, progress=shown.stage, **calibrating)
    if not speaks:
        return None
    document = {"schema": 1, "model": model, **found.to_json()}
    if calibration is not None:
        document["calibration"] = calibration
    if html is not None:
        from laconic.page import write_page

        write_page(document, html, force=force)
    if json:
        return print_json(document)
    for line in _report(document):
        typer.echo(line)
    if axes:
        from laconic.axes_report import told

        for line in told(document["axes"]):
            typer.echo(line)
    for line in _redundancy(document.get("redundancy", [])):
        typer.echo(line)
    return None


def _redundancy(tables: list[dict[str, Any]]) -> Iterator[str]:
    """The first findings of each table."""
    for table in tables:
        yield ""
        yield f"{table['name']} ({table['meaning']})"
        for row in table["findings"][:_SHOWN]:
            saving = f"{-row['weight_bytes']:+,} weight bytes, " if row["weight_bytes"] else ""
            yield f"  {row['score']:8.4f}  {row['what']:24} {saving}risk {row['risk']:.3f}  {row['where']}"
        if len(table["findings"]) > _SHOWN:
            yield f"            and {len(table['findings']) - _SHOWN} more (--json)"


def _report(data: dict[str, Any]) -> Iterator[str]:
    sizes = ", ".join(f"{name}={size}" for name, size in data["sizes"].items()) or "fixed sizes"
    exact = data["exact"]
    yield f"{data['model']} ({sizes})"
    yield f"  nodes          {data['nodes']:,}, with repeated blocks said once {data['outlined_nodes']:,}"
    yield f"  weight bytes   {data['weight_bytes']:,}"
    yield f"  FLOPs          {data['flops']:,}"
    yield (
        f"  after `exact`  {exact['nodes']:,} nodes (said once {exact['outlined_nodes']:,}), "
        f"{exact['weight_bytes']:,} weight bytes, {exact['flops']:,} FLOPs (not checked here)"
    )
    for entry in data["entries"]:
        yield from _entry(entry)
    yield ""
    yield "what each pass alone would do"
    for saving in data["savings"]:
        does = ", ".join(f"{n} {rule}" for rule, n in saving["actions"].items()) or "nothing"
        yield f"  {saving['spec']:22} {does}; {-saving['nodes']:+,} nodes, {-saving['weight_bytes']:+,} weight bytes"
    yield ""
    yield "largest weights"
    for weight in data["top_weights"][:_SHOWN]:
        yield f"  {weight['bytes']:>14,}  {weight['name']}"


def _entry(entry: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"entry {entry['name']}: {entry['nodes']:,} nodes, {entry['flops_text']} FLOPs"
    for k, stream in enumerate(entry["streams"]):
        kinds = Counter(branch["kind"] for branch in stream["branches"])
        yield f"  stream {k} from %{stream['start']}: {_counted(kinds)}"
        for run in (r for r in entry["runs"] if r["stream"] == k):
            yield from _run(run)
    sites = Counter(_site_words(site) for site in entry["sites"])
    yield "  sites"
    for words, count in sites.items():
        yield f"    {count:>3} x {words}"
    for reason in {branch["reason"]: None for s in entry["streams"] for branch in s["branches"] if branch["reason"]}:
        yield f"    mixer: {reason}"
    if entry["near_misses"]:
        yield "  near misses"
        for miss in entry["near_misses"][:_SHOWN]:
            yield f"    {miss['wanted']} at %{miss['node']}: {miss['reason']} [{miss['where']}]"
        if len(entry["near_misses"]) > _SHOWN:
            yield f"    and {len(entry['near_misses']) - _SHOWN} more"
    if entry["uncounted"]:
        yield f"  FLOPs not counted: {', '.join(entry['uncounted'])}"
    yield f"  peak activation bytes {entry['peak_bytes']:,} at %{entry['peak_node']}"
    for value in entry["live_at_peak"][:3]:
        yield f"    {value['bytes']:>12,}  %{value['node']} {value['type']} [{value['where']}]"
    yield "  most FLOPs"
    for call in entry["top_flops"][:3]:
        yield f"    {call['flops']:>12,}  %{call['node']} {call['op']} [{call['where']}]"


def _run(run: dict[str, Any]) -> Iterator[str]:
    slots = _counted(run["slots"])
    turns = f", what they read from outside recurs every {run['turns']} blocks" if run["turns"] > 1 else ""
    yield (
        f"    {run['count']} blocks, each {run['period']} branch{'es' * (run['period'] > 1)} and {run['nodes']} nodes "
        f"(slots: {slots}){turns}: "
        f"{run['said_again']:,} nodes are said again"
    )
    for group in run["equal_weights"]:
        yield f"      equal weights: blocks {', '.join(map(str, group))}"
    nearest = sorted(run["likeness"], key=lambda pair: pair["distance"])[:3]
    if nearest:
        pairs = ", ".join(f"{p['a']}-{p['b']} {p['distance']:.6g} (cosine {p['cosine']:.6g})" for p in nearest)
        yield f"      nearest in relative weight distance: {pairs}"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in counts.items())


def _site_words(site: dict[str, Any]) -> str:
    """A site without its place."""
    if site["kind"] == "attention":
        kind = {True: "cross", False: "self", None: "unplaced"}[site["cross"]]
        facts = [
            f"{kind} attention, {site['heads']} heads of {site['head_dim']}",
            f"{site['kv_heads']} for keys and values" if site["kv_heads"] != site["heads"] else "",
            "causal" if site["causal"] else "masked" if site["masked"] else "",
            f"window {site['window']}" if site["window"] else "",
            f"scores capped at {site['softcap']:g}" if site["softcap"] is not None else "",
            "sink" if site["sink"] else "",
            "rotary" if site["rotary"] else "",
            "norms on q and k" if site["qk_norm"] else "",
            "" if site["fused"] else "written out",
        ]
    elif site["kind"] == "mlp":
        facts = [f"MLP {site['hidden']} -> {site['width']}", site["activation"], "gated" if site["gated"] else ""]
    elif site["kind"] == "moe":
        facts = [
            f"MoE, {site['top_k']} of {site['experts']} experts {site['hidden']} -> {site['width']}",
            site["activation"],
            "gated" if site["gated"] else "",
            site["score"] + (", renormalised" if site["renormalised"] else ""),
            f"{site['impl']} ({site['layout']})",
            f"{len(site['shared'])} shared" if site["shared"] else "",
        ]
    else:
        facts = [
            f"{site['norm']} norm",
            f"eps {site['eps']:g}" if site["eps"] else "",
            "" if site["fused"] else "written out",
        ]
    return ", ".join(fact for fact in facts if fact)
