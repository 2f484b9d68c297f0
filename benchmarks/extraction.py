"""What one task of a model costs when it is cut out, and how far it can be pruned: `python benchmarks/extraction.py`.

    python benchmarks/extraction.py [--only costs|pruning] [--seconds 4] [--calibration 64]

Costs, for the pretrained vision model, a table model and a small text encoder with random weights: one task extracted
against that task and all tasks in the full model. Latency is of one thread, seconds of the process, medians of
interleaved rounds; ratios are medians of the rounds' ratios. Memory is the peak of a fresh process over what it has
once the library is imported: loading the folder and one batch of 32. ONNX Runtime has one thread, too.

Pruning, for each task of the pretrained model: share of the extracted model's parameters left against the change of
its metrics. Experts go by usage, or by output where 30 % of the parameters go, on a few training images; where 30 or
40 % go, also with what is left learning the features there were, on more training images without their labels
(`recover`). Validation images choose, per task, the smallest model that loses at most 0.5 %, and test images score it.

Writes benchmarks/extraction/*.json and docs/extraction.md; the file keeps what a run leaves out.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import torch
from measure import interleaved
from records import machine
from torch.utils.data import DataLoader, Subset

from moe_mtl import create_model, extract, load, prune, save
from moe_mtl.cost import count_flops, count_parameters
from moe_mtl.data import collate
from moe_mtl.data.procroom import ProcRoom
from moe_mtl.multitask import evaluating
from moe_mtl.scoring import TaskMetrics, multi_task_gain
from moe_mtl.tasks import Task

FOLDER = Path(__file__).with_suffix("")
DOC = FOLDER.parents[1] / "docs" / "extraction.md"
BATCHES = (1, 32)
ALLOWED, AIM = 0.5, 0.7  # percent a task may lose, share of the parameters that is to be left
RECOVER = {"updates": 200, "lr": 2e-3}  # of 16 images
WAYS = {"usage": {"by": "usage"}, "output": {"by": "output"}, "usage, recovered": {"by": "usage", **RECOVER}}
POINTS = [
    *(("usage", budget) for budget in (0.9, 0.8, 0.7, 0.6)),
    ("output", AIM),
    *(("usage, recovered", budget) for budget in (AIM, 0.6)),
]
ENCODER = {
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 8000,
}
LENGTH = 32  # tokens per text


# ---- models and inputs ----------------------------------------------------------------------------------------------


def models() -> dict[str, tuple[Any, str, Any]]:
    """Name to a model, the task that is cut out, and 32 inputs."""
    torch.manual_seed(0)
    vit = create_model("m3vit_micro.procroom", pretrained=True)
    columns = [{"name": "x", "kind": "vector", "size": 200}]
    of_rows = [Task.binary(f"label{i}") for i in range(4)]
    table = create_model("ple_table", tasks=of_rows, columns=columns, widths=[128, 64], private=4, shared=4)
    of_texts = [Task.classification(f"topic{i}", 20) for i in range(4)]
    text = create_model("text_moe", tasks=of_texts, encoder=ENCODER, experts=8, k=1)
    ids = torch.randint(0, ENCODER["vocab_size"], (max(BATCHES), LENGTH))
    return {
        "m3vit_micro.procroom": (vit, "depth", torch.rand(max(BATCHES), 3, 64, 64)),
        "ple_table": (table.eval(), "label0", {"vector": torch.randn(max(BATCHES), 200)}),
        "text_moe": (text.eval(), "topic0", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
    }


def rows(x: Any, count: int) -> Any:
    """The first samples of an input."""
    return {key: t[:count] for key, t in x.items()} if isinstance(x, Mapping) else x[:count]


# ---- costs ----------------------------------------------------------------------------------------------------------


def measure_costs(model: Any, task: str, x: Any, seconds: float) -> dict[str, Any]:
    """Parameters, FLOPs, latency and memory of all tasks, one, and one extracted."""
    alone: Any = extract(model, task)
    found: dict[str, Any] = {"task": task, "tasks": len(model.tasks)}
    found["parameters"] = {"full": count_parameters(model), "extracted": count_parameters(alone)}
    one = rows(x, 1)
    found["flops"] = {
        "all tasks": count_flops(model, one),
        "one task": count_flops(model, one, [task]),
        "extracted": count_flops(alone, one),
    }
    with tempfile.TemporaryDirectory() as folder:
        session = onnx_session(alone, x, Path(folder) / "model.onnx")
        found["seconds"], found["ratios"] = {}, {}
        for batch in BATCHES:
            some = rows(x, batch)
            feed = {name: t.numpy() for name, t in (some.items() if isinstance(some, Mapping) else [("x", some)])}
            steps = {
                "all tasks": lambda some=some: model(some),
                "one task": lambda some=some: model(some, tasks=[task]),
                "extracted": lambda some=some: alone(some),
                "extracted, onnxruntime": lambda feed=feed: session.run(None, feed),
            }
            with torch.inference_mode():
                times = interleaved(steps, torch.device("cpu"), 100, seconds, time.process_time)
            found["seconds"][str(batch)] = {name: statistics.median(each) for name, each in times.items()}
            found["ratios"][str(batch)] = {
                f"{name} / {base}": statistics.median([a / b for a, b in zip(times[name], times[base], strict=True)])
                for name, base in (
                    ("extracted", "all tasks"),
                    ("extracted", "one task"),
                    ("extracted, onnxruntime", "extracted"),
                )
            }
        for name, kept in (("full", model), ("extracted", alone)):
            save(kept, Path(folder) / name)
        torch.save(x, Path(folder) / "x.pt")
        found["peak_bytes"] = {name: peak(Path(folder), name, None) for name in ("full", "extracted")}
        found["peak_bytes"]["full, one task"] = peak(Path(folder), "full", task)
    return found


def onnx_session(model: Any, x: Any, file: Path) -> Any:
    """The model in onnxruntime, of any batch, with one thread."""
    import onnxruntime

    batch = {0: torch.export.Dim("batch", min=1)}
    shapes = dict.fromkeys(x, batch) if isinstance(x, Mapping) else batch
    names = list(x) if isinstance(x, Mapping) else ["x"]
    how: dict[str, Any] = {"kwargs": {"x": x}, "dynamic_shapes": {"x": shapes}, "input_names": names}
    torch.onnx.export(model, (), file, dynamo=True, verbose=False, **how)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options)
    ours = session.run(None, {n: t.numpy() for n, t in (x.items() if isinstance(x, Mapping) else [("x", x)])})[0]
    (theirs,) = model(x).values()
    torch.testing.assert_close(torch.from_numpy(ours), theirs.detach(), rtol=1e-3, atol=1e-4)
    return session


def peak(folder: Path, name: str, task: str | None) -> int:
    """Bytes a fresh process takes at most to load a model and run 32 inputs, over what it has before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_mtl.hub", "moe_mtl.backbones.hf_encoder", "timm"])
    with context.Pool(1) as pool:
        return pool.apply(run_once, (str(folder), name, task))


def run_once(folder: str, name: str, task: str | None) -> int:
    """What `peak` runs."""
    torch.set_num_threads(1)
    x = torch.load(Path(folder) / "x.pt", weights_only=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    model: Any = load(Path(folder) / name)
    with torch.inference_mode():
        model(x) if task is None else model(x, tasks=[task])
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes, from what the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# ---- pruning --------------------------------------------------------------------------------------------------------


def measure_pruning(calibration: int, val: int, test: int) -> dict[str, Any]:
    """The curve of every task on validation images, and the chosen points on test images."""
    model, data = create_model("m3vit_micro.procroom", pretrained=True), ProcRoom()
    images = batches(data, "train", calibration, model.tasks)
    sets = {"val": batches(data, "val", val, model.tasks), "test": batches(data, "test", test, model.tasks)}
    more = Subset(data.split("train"), range(16 * RECOVER["updates"]))
    found: dict[str, Any] = {"calibration": calibration, "val": val, "test": test, "tasks": {}}
    for task in model.tasks:
        whole: Any = extract(model, task.name)
        base = {split: score(whole, sets[split]) for split in sets}
        size, points, small = count_parameters(whole), [], {}
        for by, budget in POINTS:
            how: Any = {**WAYS[by], "recover": more if "updates" in WAYS[by] else None}
            one: Any = prune(model, task.name, images, budget=budget, **how)
            small[by, budget] = one
            points.append({"by": by, "budget": budget, "share": count_parameters(one) / size})
            points[-1] |= {"val": gain(one, score(one, sets["val"]), base["val"]), "lacking": one.extraction.lacking}
            points[-1]["kept"] = {name: list(layer.kept) for name, layer in one.extraction.layers.items()}
        fits = [point for point in points if point["val"] >= -ALLOWED]
        chosen = min(fits, key=lambda point: (point["share"], -point["val"]), default=None)
        aimed = max((p for p in points if p["budget"] == AIM), key=lambda point: point["val"])
        for point in (chosen, aimed):
            if point is not None and "test" not in point:
                one = small[point["by"], point["budget"]]
                point["test"] = gain(one, score(one, sets["test"]), base["test"])
        found["tasks"][task.name] = {
            "parameters": size,
            "points": points,
            "chosen": chosen,
            "aimed": aimed,
        }
        print(f"{task.name}: chosen {brief(chosen)}; {AIM:.0%} left: {brief(aimed)}", file=sys.stderr)
    return found


def brief(point: Mapping[str, Any] | None) -> str:
    """A point in a few words."""
    if point is None:
        return "none"
    return f"{point['share']:.0%} by {point['by']}, val {point['val']:+.2f} %, test {point['test']:+.2f} %"


def batches(data: ProcRoom, split: str, count: int, tasks: Any) -> list[dict[str, Any]]:
    """The first so many samples of a split."""
    some = Subset(data.split(split), range(count))
    return list(DataLoader(some, batch_size=64, collate_fn=lambda samples: collate(samples, tasks)))


def score(model: Any, some: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The metrics of a model of one task."""
    metrics = TaskMetrics(model.tasks)
    with evaluating(model):
        for batch in some:
            metrics.update(model(batch["image"]), batch)
    return metrics.compute()


def gain(model: Any, ours: Any, theirs: Any) -> float:
    """How much better a model of one task is, in percent, the mean over its metrics."""
    return multi_task_gain(ours, theirs, model.tasks)["delta_task"]


SPLITS = ("val", "test")
HEAD = (
    "one task extracted",
    "parameters, of the full model",
    "FLOPs, of all tasks",
    *(
        column
        for batch in BATCHES
        for column in (f"batch {batch}: time, of all tasks", "of one task in the full model", "ONNX Runtime / torch")
    ),
    "peak memory, of the full model",
)


# ---- the document ---------------------------------------------------------------------------------------------------


def write_doc(costs: Mapping[str, Any], pruning: Mapping[str, Any]) -> str:
    """docs/extraction.md."""
    lines = [
        "# One task, extracted and pruned",
        "",
        "Written by `benchmarks/extraction.py` from `benchmarks/extraction/*.json`; how it measures stands there.",
    ]
    if costs:
        lines += [
            "",
            f"Measured on {costs['machine']['cpu']}, torch {costs['machine']['torch']}, one thread, "
            f"{costs['machine']['date']}. The table and text models have random weights.",
            "",
            f"| {' | '.join(HEAD)} |",
            "|---" * len(HEAD) + "|",
        ]
        for name, one in costs["models"].items():
            flops = one["flops"]
            cells = [
                f"{name}, {one['task']} of {one['tasks']} tasks",
                f"{one['parameters']['extracted'] / one['parameters']['full']:.0%} of {one['parameters']['full']:,}",
                f"{flops['extracted'] / flops['all tasks']:.0%} of {flops['all tasks'] / 1e6:.1f} M",
            ]
            for batch in BATCHES:
                full = one["seconds"][str(batch)]["all tasks"] * 1e3
                first, *rest = one["ratios"][str(batch)].values()
                cells += [f"{first:.0%} of {full:.2f} ms", *(f"{ratio:.2f}" for ratio in rest)]
            peaks = one["peak_bytes"]
            cells.append(f"{peaks['extracted'] / peaks['full']:.0%} of {peaks['full'] / 2**20:.0f} MiB")
            lines.append(f"| {' | '.join(cells)} |")
    if pruning:
        lines += ["", "## Pruning m3vit_micro.procroom", "", "![Pruning curves](extraction.png)", ""]
        lines += pruning_lines(pruning)
    return "\n".join(lines) + "\n"


def pruning_lines(found: Mapping[str, Any]) -> list[str]:
    """The curves and what was chosen."""
    lines = [
        f"Experts go on {found['calibration']} training images. Recovered: {RECOVER['updates']} updates of experts and "
        "gates on the features of the extracted model, of 16 training images each, without labels. Change of a task's "
        f"metrics against its extracted model, in percent, on {found['val']} validation images, with so many "
        "of the extracted model's parameters left:",
        "",
        f"| task | {' | '.join(f'{budget:.0%}, by {by}' for by, budget in POINTS)} |",
        f"|---|{'---|' * len(POINTS)}",
    ]
    for task, one in found["tasks"].items():
        at = {(point["by"], point["budget"]): point["val"] for point in one["points"]}
        cells = [f"{at[point]:+.2f}" for point in POINTS]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The smallest model that loses at most {ALLOWED} % on validation images, and the best of those with at "
        f"most {AIM:.0%} left, on {found['test']} test images:",
        "",
        f"| task | chosen: parameters left | validation | test | {AIM:.0%} left: by | validation | test |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, one in found["tasks"].items():
        chosen, aimed = one["chosen"], one["aimed"]
        cells = ["none", "", ""]
        if chosen is not None:
            cells = [f"{chosen['share']:.1%} by {chosen['by']}", f"{chosen['val']:+.2f} %", f"{chosen['test']:+.2f} %"]
        cells += [aimed["by"], f"{aimed['val']:+.2f} %", f"{aimed['test']:+.2f} %"]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    tasks = found["tasks"].values()
    met = [task for task, one in found["tasks"].items() if min(one["aimed"][split] for split in SPLITS) >= -ALLOWED]
    chosen = [one["chosen"] for one in tasks if one["chosen"] is not None]
    held = sum(point["test"] >= -ALLOWED for point in chosen)
    lines += [
        "",
        f"{len(met)} of {len(tasks)} tasks give up {1 - AIM:.0%} of their parameters at a loss of at most {ALLOWED} % "
        f"on both{': ' + ', '.join(met) if met else ''}. Of the {len(chosen)} models chosen on validation images "
        f"{held} lose at most {ALLOWED} % on test images, too. Accuracies, of count and scene, have standard errors of "
        f"up to {50 / found['val'] ** 0.5:.1f} points on validation images and {50 / found['test'] ** 0.5:.1f} on test "
        "images; differences between two models on the same images have less.",
    ]
    return lines


def pruning_figure(found: Mapping[str, Any]) -> Any:
    """The curves, a panel per task."""
    from moe_mtl.viz import INK, TITLE, new_figure

    figure = new_figure(9.0, 4.2)
    panels: Any = figure.subplots(2, 4, sharex=True, sharey=True)
    for axes, (task, one) in zip(panels.flat, found["tasks"].items(), strict=True):
        axes.axhspan(-ALLOWED, 0, color="0.92")
        for by, style in (("usage", {"color": "0.6"}), ("usage, recovered", {"color": INK})):
            points = [(100.0, 0.0)] + [(100 * p["share"], p["val"]) for p in one["points"] if p["by"] == by]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=by, **style)
        axes.set_title(task, **TITLE)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].invert_xaxis()
    figure.supxlabel("parameters left, % of the extracted model", fontsize=8)
    figure.supylabel("change of metrics, %, validation", fontsize=8)
    panels[0, -1].legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    """Measures, writes the JSON and the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("costs", "pruning", "doc"))
    parser.add_argument("--seconds", type=float, default=4.0, help="per model and batch")
    parser.add_argument("--calibration", type=int, default=64, help="images")
    parser.add_argument("--val", type=int, default=1000, help="images")
    parser.add_argument("--test", type=int, default=4000, help="images")
    given = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    if given.only in (None, "costs"):
        found = {name: measure_costs(*each, given.seconds) for name, each in models().items()}
        (FOLDER / "costs.json").write_text(json.dumps({"machine": machine("cpu"), "models": found}, indent=1) + "\n")
    if given.only in (None, "pruning"):
        (FOLDER / "pruning.json").write_text(
            json.dumps(measure_pruning(given.calibration, given.val, given.test), indent=1) + "\n"
        )
    costs, pruning = (
        json.loads(path.read_text()) if (path := FOLDER / f"{name}.json").exists() else {}
        for name in ("costs", "pruning")
    )
    DOC.write_text(write_doc(costs, pruning))
    if pruning:
        pruning_figure(pruning).savefig(DOC.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
