"""From measured times to the lines of kernels/configs.json: which tile sizes are best where, and the table of them.

A bucket is a range of rows per expert and of widths of the result; the table knows its upper ends. What was not
measured keeps what the table held.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from itertools import product

from moe_mtl.kernels.configs import KERNELS, Config, Entry

ROWS = (48, 512)  # upper ends of the buckets of rows per expert; above the last there is one more
WIDTHS = (256, 512)  # of widths
MARGIN = 1.02  # how many times as fast a config must be to replace the table's
UNGATED = ("fused",)  # kernels that never run gated experts
MOST = 10**9
FINEST = ("group", "epilogues", "registers", "warp_specialized")  # fields that the file leaves out at their defaults

Cell = tuple[bool, int | None, int | None, bool]  # gated, upper ends of rows and width, can be warp-specialized


@dataclass(frozen=True)
class Bucket:
    """Calls that use the same tile sizes; None is no upper end. warp_specialized: they can run such kernels."""

    kernel: str
    bits: int
    glu: bool
    max_rows: int | None
    max_width: int | None
    warp_specialized: bool = False


def bucket_of(kernel: str, bits: int, glu: bool, rows: int, width: int, warp_specialized: bool = False) -> Bucket:
    """The bucket of a call; arguments as in `moe_mtl.kernels.configs.pick`."""
    return Bucket(kernel, bits, glu, _end(rows, ROWS), _end(width, WIDTHS), warp_specialized)


def best(times: dict[str, dict[Config, float]], current: Config) -> Config:
    """The config with the least geometric mean of seconds, each relative to the best of its problem.

    Args:
        times: of each problem of a bucket, seconds by config. Only configs that ran on all problems count.
        current: kept unless another is faster by `MARGIN`.

    Raises:
        ValueError: no config ran on all problems.
    """
    common = set.intersection(*(set(by_config) for by_config in times.values()))
    if not common:
        raise ValueError("times: no config ran on all problems")

    def cost(config: Config) -> float:
        logs = [math.log(by_config[config] / min(by_config.values())) for by_config in times.values()]
        return math.exp(sum(logs) / len(logs))

    fastest = min(sorted(common, key=str), key=cost)
    return current if current in common and cost(current) <= MARGIN * cost(fastest) else fastest


def newest_known(table: list[Entry], arch: int) -> int:
    """The compute capability whose lines a chip takes.

    Raises:
        ValueError: the chip is older than all that the table knows.
    """
    known = [entry.arch for entry in table if entry.arch <= arch]
    if not known:
        raise ValueError(f"arch: the table has nothing for compute capability {arch / 10:.1f} or older")
    return max(known)


def picked(lines: list[Entry], kernel: str, bits: int, *call: int) -> Config | None:
    """The first line that fits, of lines of one chip; arguments as in `moe_mtl.kernels.configs.pick`."""
    fitting = (line for line in lines if line.fits(kernel, line.arch, bits, *call))
    return next((line.config for line in fitting), None)


def merged(table: list[Entry], arch: int, chosen: dict[Bucket, Config]) -> list[Entry]:
    """The table with the chosen configs for that chip, and the lines of other chips as they were.

    A chip without lines of its own starts from those it used before, without warp-specialized ones, which are Hopper's.
    """
    known = newest_known(table, arch)
    kept = [entry for entry in table if entry.arch == known and (known == arch or not entry.config.warp_specialized)]
    old = [_relabelled(entry, arch) for entry in kept]
    new = []
    for bits, kernel in product((16, 32), KERNELS):
        mine = [entry for entry in old if (entry.bits, entry.kernel) == (bits, kernel)]
        here = {bucket: config for bucket, config in chosen.items() if (bucket.bits, bucket.kernel) == (bits, kernel)}
        new += _lines(mine, here, arch) if here else mine
    lines = [entry for entry in table if entry.arch != arch] + new
    return sorted(lines, key=lambda entry: (entry.arch, entry.bits, KERNELS.index(entry.kernel)))


def text(table: list[Entry]) -> str:
    """The JSON file: a list, one line per entry, without what is left at its default."""
    lines = []
    for entry in table:
        config = asdict(entry.config)
        for field in fields(Config):
            if field.name in FINEST and config[field.name] == field.default:
                del config[field.name]
        line = {name: getattr(entry, name) for name in ("kernel", "arch", "bits", "glu", "max_rows", "max_width")}
        lines.append(json.dumps({n: v for n, v in line.items() if v is not None} | {"config": config}))
    return "[\n " + ",\n ".join(lines) + "\n]\n"


def _end(value: int | None, ends: tuple[int, ...]) -> int | None:
    """The smallest end that is not below the value; None past the last."""
    return None if value is None else next((end for end in ends if value <= end), None)


def _relabelled(entry: Entry, arch: int) -> Entry:
    return Entry(**{field.name: getattr(entry, field.name) for field in fields(Entry)} | {"arch": arch})


def _lines(old: list[Entry], chosen: dict[Bucket, Config], arch: int) -> list[Entry]:
    """Lines of one kernel and dtype: what was chosen, elsewhere what the old lines say, as few as will do.

    Calls that can run warp-specialized kernels use others where those were chosen, or where the old lines say so.
    """
    sample = next(iter(chosen))
    rows = (*sorted({*ROWS, *(e.max_rows for e in old if e.max_rows)}), None)
    widths = (*sorted({*WIDTHS, *(e.max_width for e in old if e.max_width)}), None)
    cells: dict[Cell, Config] = {}
    for glu, r, w in product((False,) if sample.kernel in UNGATED else (True, False), rows, widths):
        found = []
        for can in (False, True):
            bucket = Bucket(sample.kernel, sample.bits, glu, _end(r, ROWS), _end(w, WIDTHS), can)
            call = (sample.kernel, sample.bits, glu, r or MOST, w or MOST, can)
            found.append(chosen.get(bucket) or picked(old, *call))
        plain, special = found
        if plain:
            cells[glu, r, w, True] = special if special and special.warp_specialized else plain
            cells[glu, r, w, False] = plain
    if _says(old, sample, cells):
        return old
    lines = [
        Entry(sample.kernel, arch, sample.bits, config, glu or (False if config.warp_specialized else None), r, w)
        for (glu, r, w, _), config in cells.items()
    ]
    done = False
    while not done:  # a line goes when the ones after it say the same
        shorter = ([*lines[:i], *lines[i + 1 :]] for i in range(len(lines)))
        fewer = next((s for s in shorter if _says(s, sample, cells)), None)
        done, lines = fewer is None, fewer or lines
    return lines


def _says(lines: list[Entry], sample: Bucket, cells: dict[Cell, Config]) -> bool:
    return all(
        picked(lines, sample.kernel, sample.bits, glu, rows or MOST, width or MOST, can) == config
        for (glu, rows, width, can), config in cells.items()
    )
