"""A model card as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from laconic.models.train import recipe

#: What intervals are drawn over, by what a model reads.
_UNITS = {"kneser_ney": "package", "reading": "digit"}
_LOOKS = 8


def page(card: dict[str, Any], curve: Sequence[dict[str, float]]) -> str:
    """A card in words; `curve` has a row per look at the selection split."""
    blocks = [
        [f"# zoo:{card['name']}"],
        [_about(card)],
        _table(["split", *(row["metric"] for row in card["eval"]["test"])], _evaluated(card)),
        _table(["nats per token", "model", "5-gram Kneser-Ney", "better by"], _against_baseline(card)),
        _table(["digits read one by one", "right", "loses", "whole canvases"], _reading(card)),
        [_router(card)],
        [_data(card)],
        _table(["step", "processor minutes", *_columns(curve)], _looks(curve)),
        [_legend(curve)],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block and block[0]) + "\n"


def _about(card: dict[str, Any]) -> str:
    machine = card["machine"]
    measured = f"Measured with torch {machine['torch']} on {machine['cpu']}, in float32"
    units = next((unit for key, unit in _UNITS.items() if key in card), "group")
    again = f"`laconic eval zoo:{card['name']}` measures the first table again (test split)"
    all_again = f"`python -m laconic.models.card {card['name']}` all of this page"
    count = card["eval"]["test"][0]["units"]
    figures = f"{measured}; 95 % intervals by {units} ({count} on test). {again}, {all_again}."
    if "training" not in card:
        size = f"`{card['class']}` as its package brings it, {card['weights']['bytes'] / 1e6:.1f} MB."
        return f"{size} {figures}"
    said = " ".join((type(recipe(card["name"], Path("build"))).__doc__ or "").split())
    text = "Python's standard library" if "kneser_ney" in card else "handwritten digits on canvases"
    training = card["training"]
    made = (
        f"`{card['class']}`, {card['weights']['bytes'] / 1e6:.1f} MB in bfloat16, trained on {text} with seed "
        f"{training['seed']} in {training['steps']:,} steps, {training['seconds'] / 60:.0f} processor minutes."
    )
    return f"{said}\n\n{made} {figures}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table, or nothing where there are no rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *lines] if lines else []


def _evaluated(card: dict[str, Any]) -> list[list[str]]:
    return [[split, *map(_interval, rows)] for split, rows in card["eval"].items()]


def _against_baseline(card: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"{split}, {part} ({row['tokens']:,} tokens)",
            *(_interval(row[k]) for k in ("model", "baseline", "better_by")),
        ]
        for split, parts in card.get("kneser_ney", {}).items()
        for part, row in parts.items()
    ]


def _reading(card: dict[str, Any]) -> list[list[str]]:
    return [
        [f"{split}, all tokens", _interval(row["greedy"]), "", f"{row['whole_images']:.3f}"]
        for split, row in card.get("reading", {}).items()
    ] + [
        [f"{split}, {place}", _interval(half["read"]), _interval(half["loses"]), ""]
        for split, row in card.get("reading", {}).items()
        for place, half in row.items()
        if place.startswith("half")
    ]


def _router(card: dict[str, Any]) -> str:
    if "router" not in card:
        return ""
    router = card["router"]
    said = [
        f"{router[split]['min_over_mean']:.2f} to {router[split]['max_over_mean']:.2f} on the {split} split (on one "
        f"document of it up to {router[split]['of_one_document']['greatest']:.2f}, half of them up to "
        f"{router[split]['of_one_document']['median']:.2f})"
        for split in ("selection", "test")
    ]
    text = f"Load of an expert over the mean of its layer: {', '.join(said)}. It is in balance over much text only."
    if "selection_bias" in router:
        greatest = max(abs(x) for row in router["selection_bias"] for x in row)
        text += f" Selection biases reach {greatest:.3f}."
    return text


def _data(card: dict[str, Any]) -> str:
    data = card["data"]
    if "training" in data:
        made, held = data["training"], data["documents"]
        return (
            f"Trained on {made['documents']:,} documents ({made['tokens']:,} tokens) of the library of CPython "
            f"{data['python']}; held out are {held['selection']} documents for selection and {held['test']} for test. "
            "Hashes of the training text and of each split: `card.json`."
        )
    if "digits" in data:
        digits, canvases = data["digits"], data["canvases"]
        return (
            f"Canvases are drawn anew at each step, from {digits['train']:,} digits; those of selection "
            f"({canvases['selection']} canvases) from {digits['selection']} others, those of test ({canvases['test']}) "
            f"from {digits['test']} others. The hash of the digits: `card.json`."
        )
    return f"Measured on {data['sentences']} sentences in {data['groups']} groups: few, so no more than a sign of life."


#: What a column of the curve is, by its name.
_CURVE = {
    "max load": "loads are those of the first sixteen windows of the selection split, too few to be in balance",
    "worst load": "worst load that of a batch",
    "helper": "helper the loss of a layer that is thrown away",
    "texture": "texture how strong the background is, 1 in the end and in all figures",
    "random half": "random half what is read with half of the image tokens",
}


def _legend(curve: Sequence[dict[str, float]]) -> str:
    if not curve:
        return ""
    vision = "helper" in curve[-1]
    of = (
        "the share of digits read right" if vision else "nats on the first windows of the split, documents run together"
    )
    said = [f"In the curve, selection is {of}", *(words for name, words in _CURVE.items() if name in curve[-1])]
    return "; ".join(said) + "."


def _columns(curve: Sequence[dict[str, float]]) -> list[str]:
    return [name for name in curve[-1] if name not in ("step", "seconds")] if curve else []


def _looks(curve: Sequence[dict[str, float]]) -> list[list[str]]:
    """Some of the looks, the last among them."""
    chosen = curve[::-1][:: -(-len(curve) // _LOOKS)][::-1] if curve else []
    return [
        [f"{row['step']:,}", f"{row['seconds'] / 60:.1f}", *(f"{row[name]:.3f}" for name in _columns(curve))]
        for row in chosen
    ]


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
