"""What a compiled program does, read off its text: matrix products, memory traffic and collectives, with loops counted in full.

The compiler's own `cost_analysis` counts the body of a loop once. Here every computation is weighted by how often it runs: a `while`
runs as often as the compiler annotated, or as its condition `i < constant` says. All numbers are those of one chip.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
WIDTHS = {"pred": 1, "token": 0, "bf16": 2, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25}
CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "custom-call",
}
SAME_VALUE = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape"}
PASSES = {"highest": 6, "high": 3}
"""Passes of the bf16 matrix unit that a float32 product of this precision takes; one by default."""


class Shape(NamedTuple):
    """An array's type."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def itemsize(self) -> float:
        """Bytes per entry."""
        digits = re.search(r"\d+", self.dtype)
        return WIDTHS[self.dtype] if self.dtype in WIDTHS else int(digits[0]) / 8 if digits else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        return math.ceil(math.prod(self.dims) * self.itemsize)

    @property
    def hbm_bytes(self) -> int:
        """Bytes that it occupies in HBM with the padding of its tiles; 0 if the compiler keeps it on the chip."""
        if re.search(r"S\([1-9]", self.layout):
            return 0
        order, _, tiles = self.layout.partition(":")
        minor_first = [self.dims[int(axis)] for axis in order.split(",") if axis]
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        for axis, size in enumerate(reversed([int(n) for n in tile[1].split(",")] if tile else [])):
            if axis < len(minor_first):
                minor_first[axis] = -(-minor_first[axis] // size) * size
        return math.ceil(math.prod(minor_first or [1]) * self.itemsize)


class Op(NamedTuple):
    """One instruction."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self) -> Iterator[tuple[str, str]]:
        """`(role, computation)` of what it calls."""
        for role, names in CALLED.findall(self.attributes):
            yield from ((role, name) for name in re.findall(r"[\w.-]+", names))


class Computation(NamedTuple):
    """Instructions by name, in order."""

    name: str
    ops: dict[str, Op]

    @property
    def root(self) -> Op:
        """What it returns."""
        return next(op for op in self.ops.values() if op.is_root)

    def users(self, name: str) -> list[Op]:
        """Instructions that read `name`, through bitcasts."""
        found = [op for op in self.ops.values() if name in op.operands]
        return [user for op in found for user in (self.users(op.name) if op.kind == "bitcast" and not op.is_root else [op])]


class Collective(NamedTuple):
    """`times` exchanges of `bytes` each among `chips`: of the sum, of the gathered array, or of what a chip sends."""

    kind: str
    bytes: int
    chips: int
    times: int


class Account(NamedTuple):
    """What one run of a program does on one chip.

    Attributes:
        flops: of matrix products and convolutions, two per multiply-add; all else is not counted.
        bf16_flops: the same, each product times the passes of the matrix unit that its precision takes.
        hbm_bytes: read from and written to HBM, arrays that the compiler keeps on the chip not counted.
        collectives: between chips, in order.
        unknown_loops: loops whose number of rounds the text does not show; counted as one round.
    """

    flops: int
    bf16_flops: int
    hbm_bytes: int
    collectives: list[Collective]
    unknown_loops: int


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a compiled program's text, and the name of its entry."""
    found: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if head and not line.startswith("HloModule"):
            name, entry = head[2], head[2] if head[1] else entry
            found[name] = Computation(name, {})
        elif name and (op := _op(line)):
            found[name].ops[op.name] = op
    if not entry:
        raise ValueError("text: no ENTRY computation; pass `compiled.as_text()`.")
    return found, entry


def _op(line: str) -> Op | None:
    head = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    kind = re.match(r"\s*([\w-]+)(?=\()", rest[end:])
    if not kind:
        return None
    arguments = rest[end + kind.end() :]
    close = _closing(arguments)
    shapes = tuple(
        Shape(t, tuple(int(n) for n in dims.split(",") if n), layout) for t, dims, layout in SHAPE.findall(rest[:end])
    )
    inside = arguments[1 : close - 1]
    names = [inside] if kind[1] in ("parameter", "constant") else re.findall(r"%([\w.-]+)", inside)
    return Op(head[2], kind[1], shapes, tuple(names), arguments[close:], bool(head[1]))


def _closing(text: str) -> int:
    """Where the bracket that opens `text` has closed."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    return len(text)


def account(text: str, chips: int) -> Account:
    """Everything that one run of the program of this text does on one of `chips`."""
    computations, entry = parse(text)
    flops = bf16_flops = hbm_bytes = unknown = 0
    collectives: list[Collective] = []

    def visit(name: str, times: int, is_fused: bool, chains: set[str]) -> None:
        """`chains`: collectives counted already, of those that the compiler spreads over several fusions, to work meanwhile."""
        nonlocal flops, bf16_flops, hbm_bytes, unknown
        inside = computations[name]
        for op in inside.ops.values():
            if op.kind in ("dot", "convolution") or _library_call(op):
                work = times * (_library_flops(op, inside) if _library_call(op) else _product_flops(op, inside))
                precision = re.search(r"operand_precision=\{(\w+)", op.attributes)
                flops, bf16_flops = flops + work, bf16_flops + work * PASSES.get(precision[1] if precision else "", 1)
            kind = op.kind.removesuffix("-start")
            chain = re.search(r'chain_id="\d+"', op.attributes)
            if kind in KINDS and not (chain and chain[0] in chains):
                chains |= {chain[0]} if chain else set()
                collectives.append(_collective(kind, op, inside, chips, times))
            if not is_fused:
                hbm_bytes += times * _traffic(op, inside, computations)
            rounds = 1
            if op.kind == "while":
                known = trip_count(op, inside, computations)
                rounds, unknown = 1 if known is None else known, unknown + (known is None)
            for role, called in op.called():
                fused = is_fused or role in ("calls", "to_apply") and op.kind != "call"
                visit(called, times * rounds, fused, chains if fused else set())

    visit(entry, 1, False, set())
    return Account(flops, bf16_flops, hbm_bytes, collectives, unknown)


def _product_flops(op: Op, inside: Computation) -> int:
    left, right = (inside.ops[name].shapes[0] for name in op.operands[:2])
    out = op.shapes[0].dims
    if op.kind == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return 2 * math.prod(out) * math.prod(left.dims[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    assert labels is not None, op
    of_left, of_right, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    result = 2 * out[of_out.index("b")] * out[of_out.index("f")] * right.dims[of_right.index("i")]
    for i, axis in enumerate(sorted(set(of_out) - {"b", "f"}, key=int)):

        def number(name: str, default: str = "1", i: int = i) -> str:
            return settings[name].split("x")[i] if name in settings else default

        low, _ = number("pad", "0_0").split("_")
        sizes = left.dims[of_left.index(axis)], right.dims[of_right.index(axis)], out[of_out.index(axis)]
        steps = int(number("stride")), int(number("lhs_dilate")), int(number("rhs_dilate"))
        result *= _positions(*sizes, *steps, int(low))
    return result


def _library_call(op: Op) -> str:
    """The product that a library for GPUs is called for, as `cudnn$convForward`; otherwise empty."""
    found = (
        re.search(r'custom_call_target="__(cudnn\$(?:conv|fmha)\w+|cublas\$[\w$]+)"', op.attributes)
        if op.kind == "custom-call"
        else None
    )
    return found[1] if found else ""


def _library_flops(op: Op, inside: Computation) -> int:
    """Of a product of matrices, of a convolution, padding included, of flash attention (two products), or of their gradients.

    Attention's gradient has five products, as it computes the matrix of attention again.
    """
    target, first, second = _library_call(op), *(inside.ops[name].shapes[0] for name in op.operands[:2])
    if target.startswith("cublas"):
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.attributes)
        assert contracted is not None, op
        return 2 * math.prod(op.shapes[0].dims) * math.prod(first.dims[int(axis)] for axis in re.findall(r"\d+", contracted[1]))
    if target.startswith("cudnn$fmha"):  # [b, n, heads, d] and [b, m, heads, d]
        return 2 * (5 if target.endswith("Backward") else 2) * math.prod(first.dims) * second.dims[1]
    labels = re.search(r"dim_labels=\w+_(\w+)->", op.attributes)
    assert labels is not None, op
    forward, weights = {
        "cudnn$convBackwardInput": (first, second),
        "cudnn$convBackwardFilter": (second, op.shapes[0]),
    }.get(target, (op.shapes[0], second))
    return 2 * math.prod(forward.dims) * math.prod(weights.dims) // weights.dims[labels[1].index("o")]


def _positions(n: int, window: int, out: int, stride: int, left_dilation: int, right_dilation: int, pad: int) -> int:
    """Pairs of output and window positions along one axis that meet an entry, not padding."""
    if window == 1 and stride == left_dilation == 1 and pad == 0:
        return out
    found = 0
    many, few = (np.arange(out) * stride, range(window)) if out >= window else (np.arange(window) * right_dilation, range(out))
    step = right_dilation if out >= window else stride
    for i in few:
        at = many + i * step - pad
        found += int(np.sum((at >= 0) & (at < (n - 1) * left_dilation + 1) & (at % left_dilation == 0)))
    return found


def _collective(kind: str, op: Op, inside: Computation, chips: int, times: int) -> Collective:
    sent = sum(shape.nbytes for name in op.operands for shape in inside.ops[name].shapes)
    size = group_size(op.attributes, chips)
    if kind == "all-reduce" and "all-reduce-scatter" in inside.name:  # a fusion in which every chip keeps its part of the sum
        kind = "reduce-scatter"
    return Collective(kind, sent * size if kind == "all-gather" else sent, size, times)


def group_size(attributes: str, chips: int) -> int:
    """How many chips exchange with one another, in any of the ways that the text has of writing it."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S*\))? ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2]))
    return chips


def trip_count(op: Op, inside: Computation, computations: dict[str, Computation]) -> int | None:
    """Rounds of a `while`: the compiler's annotation, or the bound of its condition `i < constant` less where `i` starts."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', op.attributes):
        return int(known[1])
    condition = computations[dict(op.called())["condition"]]
    bounds = []
    for test in condition.ops.values():
        direction = re.search(r"direction=(\w+)", test.attributes)
        if test.kind != "compare" or direction is None:
            continue
        constants = [_constant(name, condition) for name in test.operands]
        side = {"LT": 1, "LE": 1, "GT": 0, "GE": 0}.get(direction[1])
        if side is not None and (bound := constants[side]) is not None:
            bounds.append((test.operands[1 - side], bound + (direction[1] in ("LE", "GE"))))
    if len(bounds) != 1:
        return None
    counter, bound = bounds[0]
    index = re.search(r"index=(\d+)", condition.ops[counter].attributes)
    start = inside.ops.get(op.operands[0])
    first = _constant(start.operands[int(index[1])], inside) if index and start and start.kind == "tuple" else None
    return max(bound - (first or 0), 0)


def _constant(name: str, inside: Computation) -> int | None:
    """The value of a scalar integer, through copies."""
    op = inside.ops.get(name)
    while op is not None and op.kind in SAME_VALUE:
        op = inside.ops.get(op.operands[0])
    is_number = op is not None and op.kind == "constant" and re.fullmatch(r"-?\d+", op.operands[0])
    return int(op.operands[0]) if op is not None and is_number else None


def _traffic(op: Op, inside: Computation, computations: dict[str, Computation]) -> int:
    """Bytes that an instruction reads from and writes to HBM; of slices of an array, those of the slices."""
    if op.kind in NO_TRAFFIC and not _library_call(op) or op.kind.endswith("-start"):
        return 0
    if op.kind.endswith("-done"):  # a transfer between HBM and the chip, or between chips
        return sum(shape.nbytes for shape in op.shapes)
    written = sum(shape.hbm_bytes for shape in op.shapes)
    if op.kind in ("dynamic-slice", "gather", "slice"):
        return 2 * written
    if op.kind == "dynamic-update-slice":
        return 2 * _size(op.operands[1], inside)
    fused = next((computations[name] for role, name in op.called() if role == "calls"), None)
    if fused is None:
        return written + sum(_size(name, inside) for name in op.operands)
    parameters = {int(v.operands[0]): v.name for v in fused.ops.values() if v.kind == "parameter"}
    read = 0
    for i, name in enumerate(op.operands):
        users = fused.users(parameters[i])
        whole, parts = _size(name, inside), 0
        for user in users:
            into = user.kind == "dynamic-update-slice" and _is(user.operands[0], parameters[i], fused)
            sliced = user.kind in ("dynamic-slice", "gather") and _is(user.operands[0], parameters[i], fused)
            parts += 0 if into else user.shapes[0].nbytes if sliced else whole
        read += min(whole, parts) if users else 0
    results = [fused.root] if fused.root.kind != "tuple" else [fused.ops[name] for name in fused.root.operands]
    for shape, result in zip(op.shapes, results):
        if result.kind == "dynamic-update-slice":
            written += min(fused.ops[result.operands[1]].shapes[0].nbytes, shape.hbm_bytes) - shape.hbm_bytes
    return read + written


def _is(name: str, parameter: str, inside: Computation) -> bool:
    """Whether `name` is `parameter` under bitcasts."""
    while name != parameter and inside.ops[name].kind == "bitcast":
        name = inside.ops[name].operands[0]
    return name == parameter


def _size(name: str, inside: Computation) -> int:
    return sum(shape.hbm_bytes for shape in inside.ops[name].shapes)


def by_kind(collectives: list[Collective]) -> dict[str, dict[str, int]]:
    """How many collectives of each kind, and their bytes."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for c in collectives:
        found[c.kind]["count"] += c.times
        found[c.kind]["bytes"] += c.times * c.bytes
    return dict(found)
