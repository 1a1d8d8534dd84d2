"""The tables of tuning/*.json: what is in them, what makes one wrong, which one serves a GPU.

A table belongs to the GPUs it was timed on; scripts/tune.py writes it there. A GPU gets the table
that names it; else one of its compute capability, the first by file name; else default.json, whose
figures are modelled. So a GPU nobody has timed runs as its nearest relative does, and no result
depends on it: a table decides about speed only.

Entries are tried in order and the first that fits serves. Every kind and width ends in an entry
for all rows and shapes, so that a table says itself from where on dequantizing and the vendor's
GEMM (`"tile": null`) take over.
"""

import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent / "tuning"
DEFAULT = "default.json"
KINDS = ("forward", "backward")
WIDTHS = (2, 3, 4, 8)
# from the least to the most; None: no bound
Range = tuple[int, int | None]
ALL: Range = (1, None)


class Tile(NamedTuple):
    """How one program of a fused kernel is laid out."""

    rows: int
    features: int
    """Output features of a program; in the backward pass, those of one step of its sum."""
    warps: int
    stages: int
    few_rows: bool = False
    """The weight is the left operand, the scale on the accumulator."""


class Entry(NamedTuple):
    """One line of a table: the tile, or None for dequantize and GEMM, of what it serves."""

    kind: str
    bits: tuple[int, ...]
    most_rows: int | None
    out_features: Range
    in_features: Range
    tile: Tile | None

    def serves(self, kind: str, bits: int, num_rows: int, shape: tuple[int, int]) -> bool:
        """Whether it decides about that many rows times W of `shape` (O, I)."""
        return (
            self.kind == kind
            and bits in self.bits
            and (self.most_rows is None or num_rows <= self.most_rows)
            and _within(shape[0], self.out_features)
            and _within(shape[1], self.in_features)
        )

    def serves_all_of(self, other: "Entry") -> bool:
        """Whether nothing is left for `other` behind this entry."""
        enough_rows = self.most_rows is None or (
            other.most_rows is not None and other.most_rows <= self.most_rows
        )
        return (
            self.kind == other.kind
            and set(other.bits) <= set(self.bits)
            and enough_rows
            and _contains(self.out_features, other.out_features)
            and _contains(self.in_features, other.in_features)
        )


class Table(NamedTuple):
    """The tiles of one kind of GPU, and where they come from."""

    source: str
    devices: tuple[str, ...]
    """Names as `torch.cuda.get_device_name` gives them."""
    capability: str | None
    programs: int
    """Programs that fill the GPU; sums are split until there are as many."""
    max_parts: int
    entries: tuple[Entry, ...]

    def tile(self, kind: str, bits: int, num_rows: int, shape: tuple[int, int]) -> Tile | None:
        """The tile for that many rows times W of `shape` (O, I); None: dequantize and multiply."""
        return next(e.tile for e in self.entries if e.serves(kind, bits, num_rows, shape))


@cache
def table_of(device: torch.device | None = None) -> Table:
    """The table of a device; without one, of the GPU that is current at the first call."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return read_table(FOLDER / DEFAULT)
    major, minor = torch.cuda.get_device_capability(device)
    return choose_table(read_all(FOLDER), torch.cuda.get_device_name(device), f"{major}.{minor}")


def choose_table(tables: Mapping[str, Table], name: str, capability: str) -> Table:
    """The table for a GPU among those by file name: its own, a relative's, or the default."""
    for table in tables.values():
        if name in table.devices:
            return table
    for table in tables.values():
        if capability == table.capability:
            return table
    return tables[DEFAULT]


def read_all(folder: Path) -> dict[str, Table]:
    """The tables of a folder by file name, in the order of the names."""
    return {path.name: read_table(path) for path in sorted(folder.glob("*.json"))}


def read_table(path: Path) -> Table:
    """The table in a file; raises ValueError, with the place, for anything that is wrong in it."""
    try:
        return parse_table(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; scripts/tune.py writes this file") from error


def parse_table(data: Any) -> Table:
    """The table that JSON data stands for; ValueError: it is not one, or leaves something open."""
    required = ("source", "devices", "capability", "programs", "max_parts", "entries")
    _check_keys(data, required, ("made_by",))
    for key in ("programs", "max_parts"):
        _check_count(data[key], key)
    if data["capability"] is not None and not isinstance(data["capability"], str):
        raise ValueError(f"capability ({data['capability']!r}) must be text like '9.0', or null")
    for key in ("devices", "entries"):
        if not isinstance(data[key], list):
            raise ValueError(f"{key} must be a list")
    entries = []
    for number, fields in enumerate(data["entries"]):
        try:
            entries.append(_parse_entry(fields))
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from error
    _check_complete(entries)
    head = (data["source"], tuple(data["devices"]), data["capability"])
    return Table(*head, data["programs"], data["max_parts"], tuple(entries))


def _parse_entry(fields: Any) -> Entry:
    # `us`: what tune.py measured, for those who read the file
    optional = ("out_features", "in_features", "us")
    _check_keys(fields, ("kind", "bits", "most_rows", "tile"), optional)
    kind, bits = fields["kind"], fields["bits"]
    if kind not in KINDS:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(KINDS)}")
    if not isinstance(bits, list) or not bits or not set(bits) <= set(WIDTHS):
        raise ValueError(f"bits ({bits!r}) must be a list of {', '.join(map(str, WIDTHS))}")
    if fields["most_rows"] is not None:
        _check_count(fields["most_rows"], "most_rows")
    ranges = [_parse_range(fields.get(key), key) for key in ("out_features", "in_features")]
    tile = None if fields["tile"] is None else _parse_tile(fields["tile"])
    entry = Entry(kind, tuple(bits), fields["most_rows"], ranges[0], ranges[1], tile)
    _check_few_rows(entry)
    return entry


def _parse_range(value: Any, key: str) -> Range:
    if value is None:
        return ALL
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{key} ({value!r}) must be [least, most], most null where unbounded")
    least, most = value
    _check_count(least, key)
    if most is not None and (not isinstance(most, int) or most < least):
        raise ValueError(f"{key} ({value!r}) must end at {least} or more, or with null")
    return least, most


def _parse_tile(fields: Any) -> Tile:
    sizes = ("rows", "features", "warps", "stages")
    _check_keys(fields, sizes, ("few_rows",))
    for key in sizes:
        _check_count(fields[key], key)
        if key != "stages" and fields[key] & (fields[key] - 1):
            raise ValueError(f"{key} ({fields[key]}) must be a power of two")
    return Tile(**fields)


def _check_few_rows(entry: Entry) -> None:
    """Raises ValueError where rows would be left out: that kernel has one tile of rows only."""
    if entry.tile is None or not entry.tile.few_rows:
        return
    if entry.kind != "forward":
        raise ValueError("few_rows exists in the forward pass only")
    if entry.most_rows is None or entry.most_rows > entry.tile.rows:
        raise ValueError(f"few_rows: most_rows must be at most the tile's rows, {entry.tile.rows}")


def _check_complete(entries: list[Entry]) -> None:
    """Raises ValueError for an entry that is never reached, and for what no entry serves."""
    for number, entry in enumerate(entries):
        for earlier in range(number):
            if entries[earlier].serves_all_of(entry):
                raise ValueError(f"entry {number} is never reached: entry {earlier} serves it all")
    for kind in KINDS:
        for bits in WIDTHS:
            rest = Entry(kind, (bits,), None, ALL, ALL, None)
            if not any(entry.serves_all_of(rest) for entry in entries):
                raise ValueError(f"no entry serves every {kind} of {bits} bits")


def _check_keys(fields: Any, required: Collection[str], optional: Collection[str]) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{fields!r} must be an object")
    missing = [key for key in required if key not in fields]
    unknown = [key for key in fields if key not in (*required, *optional)]
    if missing or unknown:
        words = [f"missing {', '.join(missing)}"] if missing else []
        words += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise ValueError("; ".join(words))


def _check_count(value: Any, key: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} ({value!r}) must be a whole number, 1 or more")


def _within(value: int, bounds: Range) -> bool:
    return bounds[0] <= value and (bounds[1] is None or value <= bounds[1])


def _contains(outer: Range, inner: Range) -> bool:
    upper = outer[1] is None or (inner[1] is not None and inner[1] <= outer[1])
    return outer[0] <= inner[0] and upper
