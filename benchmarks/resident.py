"""Memory and time of one task of m3vit_base with its experts in the file: `python benchmarks/resident.py`.

    python benchmarks/resident.py [--batches 1 8] [--seconds 20]

A model of random weights is saved once, to a temporary folder. Every reading of memory is of a fresh process, over
what it holds once all libraries are imported and a tiny model has run: the peak of resident memory (VmHWM) while the
model is loaded and predicts, and what is resident afterwards, anonymous pages and pages of mapped files apart.

    load        `Predictor(folder)`: the file is mapped and copied into a model made before
    in place    all weights in memory, read straight into a model made before: the least that loading all can take
    bounded     `Predictor(folder, memory="bounded")`

The bound is on bounded against the smaller of the other two. Times are of one process, rounds interleaved, the file in
the system's page cache; with one thread they are seconds of the process, which other jobs on the machine disturb less,
and copying from the cache is among them. "cold" drops the file from the cache before each call, so the disk is in it;
it and what it is compared with are of the wall.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import torch
from measure import interleaved
from records import machine

from moe_mtl import Predictor, Task, create_model, hub
from moe_mtl.tensor_file import TensorFile

OUT = Path(__file__).with_name("resident") / "m3vit_base.json"
BOUND = 0.55  # of loading all
TASKS = [
    Task.segmentation("semseg", 40),
    Task.depth(),
    Task.normals(),
    Task.binary_map("edges"),
    Task.classification("scene", 27),
]
RUN = "depth"
WAYS = ("load", "in place", "bounded")
COLD_CALLS = 5


def predictor(way: str, folder: Path) -> Predictor:
    """The model of a folder, loaded in one of `WAYS`."""
    if way != "in place":
        return Predictor(folder, RUN, memory="bounded" if way == "bounded" else "all")
    model, file = hub.build(*hub.read_config(folder)), TensorFile(folder / hub.WEIGHTS)
    for name, tensor in model.state_dict().items():
        file.read(name, tensor)
    return Predictor(model, RUN)


def pictures(batch: int, side: int = 224) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def status() -> dict[str, int]:
    """Bytes of this process, from /proc."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def memory(way: str, folder: Path, batch: int) -> dict[str, Any]:
    """Bytes of this process, over its imports, and a digest of what it predicts."""
    Predictor(create_model("m3vit_micro", tasks=TASKS))(pictures(1, 64))  # imports, threads, kernels
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status()
    predict = predictor(way, folder)
    answers = predict(pictures(batch), raw=True)
    after = status()
    digest = hashlib.sha256(b"".join(answer[RUN].numpy().tobytes() for answer in answers)).hexdigest()
    found: dict[str, Any] = {"peak": after["VmHWM"] - before["VmRSS"]}
    found |= {key: after[key] - before[key] for key in ("VmRSS", "RssAnon", "RssFile")}
    return found | {"baseline": before["VmRSS"], "digest": digest}


def seconds(folder: Path, batch: int, limit: float) -> dict[str, Any]:
    """Seconds of a call in memory, bounded, and bounded from a file that is in no cache; ratios of medians."""
    x, ways = pictures(batch), {way: predictor(way, folder) for way in ("load", "bounded")}
    steps = {way: lambda predict=predict: predict(x, raw=True) for way, predict in ways.items()}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = interleaved(steps, torch.device("cpu"), rounds=1000, seconds=limit, clock=clock)
    wall: dict[str, list[float]] = {way: [] for way in steps}
    with open(folder / hub.WEIGHTS, "rb") as file:
        for _ in range(COLD_CALLS):
            for way, step in steps.items():
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                began = time.perf_counter()
                step()
                wall[way].append(time.perf_counter() - began)
    warm, cold = ({way: statistics.median(own) for way, own in found.items()} for found in (times, wall))
    ratios = {name: own["bounded"] / own["load"] for name, own in (("bounded_ratio", warm), ("cold_ratio", cold))}
    return {"seconds": warm, "cold_seconds": cold, **ratios, "rounds": len(times["load"])}


def fresh(*task: str) -> dict[str, Any]:
    """What this script says in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *task], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def told(row: dict[str, Any]) -> str:
    """The table of one batch size."""
    mib = {way: {k: v / 2**20 for k, v in own.items() if k != "digest"} for way, own in row["memory"].items()}
    lines = [f"batch {row['batch']}, one task, {row['threads']} threads; MiB over imports"]
    lines.append(f"  {'':10}{'peak':>9}{'after':>9}{'anonymous':>11}{'of files':>10}{'ms':>9}")
    for way, own in mib.items():
        ms = f"{1e3 * row['seconds'][way]:9.1f}" if way in row["seconds"] else ""
        lines.append(f"  {way:10}{own['peak']:9.0f}{own['VmRSS']:9.0f}{own['RssAnon']:11.0f}{own['RssFile']:10.0f}{ms}")
    lines.append(
        f"  peak {row['share']:.0%} of loading all ({row['share_of_load']:.0%} of load), bound {BOUND:.0%}: "
        f"{'met' if row['share'] <= BOUND else 'MISSED'}; outputs {'equal' if row['equal'] else 'DIFFER'}; "
        f"time x{row['bounded_ratio']:.2f} (x{row['cold_ratio']:.2f} from a cold file)"
    )
    return "\n".join(lines)


def measure(folder: Path, batch: int, limit: float) -> dict[str, Any]:
    """All readings of one batch size."""
    found = {way: fresh("memory", way, str(folder), str(batch)) for way in WAYS}
    least = min(found[way]["peak"] for way in ("load", "in place"))
    return {
        "batch": batch,
        "threads": torch.get_num_threads(),
        "memory": found,
        "share": found["bounded"]["peak"] / least,
        "share_of_load": found["bounded"]["peak"] / found["load"]["peak"],
        "equal": len({own["digest"] for own in found.values()}) == 1,
        **fresh("seconds", str(folder), str(batch), str(limit)),
        "load_of_machine": os.getloadavg()[0],
    }


def main(options: list[str]) -> None:
    if options and options[0] == "memory":
        print(json.dumps(memory(options[1], Path(options[2]), int(options[3]))))
        return
    if options and options[0] == "seconds":
        print(json.dumps(seconds(Path(options[1]), int(options[2]), float(options[3]))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, per batch size")
    parser.add_argument("--model", default="m3vit_base")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(options)
    with tempfile.TemporaryDirectory() as root:
        torch.manual_seed(0)
        model = create_model(args.model, tasks=TASKS)
        sizes = {"parameters": sum(p.numel() for p in model.parameters())}
        sizes["in_experts"] = sum(p.numel() for layer in model.moe_layers.values() for p in layer.experts.parameters())  # type: ignore[operator, union-attr]
        folder = hub.save(model, Path(root) / "model")
        del model
        rows = []
        for batch in args.batches:
            rows.append(measure(folder, batch, args.seconds))
            print(told(rows[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = {**machine("cpu"), "model": args.model, "task": RUN, "bound": BOUND, **sizes, "rows": rows}
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
