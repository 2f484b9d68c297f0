"""The report page: one HTML file with the numbers `eval.py` measured, pictures of predictions, and expert usage.

Self-contained: pictures are inlined, nothing is loaded from the network, no script runs.
"""

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moe_mtl.cost import AGREES
from moe_mtl.hub import replace_file
from moe_mtl.page import document, picture, table, td, th
from moe_mtl.pictures import Pictures
from moe_mtl.results import format_metric, width_of


def write_report(path: str | os.PathLike[str], results: Mapping[str, Any], pictures: Pictures) -> Path:
    """Writes the page, whole or not at all.

    Args:
        path: the HTML file; its folder is made when missing.
        results: what `eval.py` writes as JSON; see `eval.py` for the keys.
        pictures: the figures.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = [
        ("Scores", _scores(results)),
        ("What one task costs", _cost(results)),
        ("Predictions", _predictions(results, pictures)),
        ("Which experts each task uses", _experts(results, pictures)),
        ("Run", _run(results)),
    ]
    page = document(f"{results['label']} on {results['data']['name']}", _headline(results), sections)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


# ---- sections -------------------------------------------------------------------------------------------------------


def _headline(results: Mapping[str, Any]) -> str:
    model, data = results["model"], results["data"]
    cards = [
        (_short(model["parameters"]), "parameters"),
        (str(len(results["tasks"])), "tasks, one model"),
        (f"{data['samples']:,}", f"{data['split']} samples scored"),
    ]
    alone = _mean(results, "one task extracted", "relative_flops") or _mean(results, "one task", "relative_flops")
    if alone:
        cards.append((f"{alone:.0%}", "of the FLOPs for one task, on average"))
    cards += [
        (_signed(baseline["gain"]["delta_task"]), f"delta_task over {_words(baseline['label'])}")
        for baseline in results["baselines"]
    ]
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in cards)
    trained = results.get("training")
    return f'<div class="cards">{boxes}</div>' + (f"<p>{escape(trained)}</p>" if trained else "")


def _scores(results: Mapping[str, Any]) -> str:
    baselines = results["baselines"]
    rows = []
    for task, metrics in results["metrics"].items():
        for i, (metric, value) in enumerate(metrics.items()):
            info = results["metric_info"][task][metric]
            row = [th(task, span=len(metrics))] if i == 0 else []
            row.append(td(f"{'▲' if info['higher_is_better'] else '▼'} {_words(metric)}"))
            row.append(td(format_metric(value, info["unit"]), number=True))
            for baseline in baselines:
                theirs = escape(format_metric(baseline["metrics"].get(task, {}).get(metric), info["unit"]))
                gain = baseline["gain"]["per_metric"].get(task, {}).get(metric)
                row.append(td(theirs + _change(gain), number=True, raw=True))
            rows.append("".join(row))
    text = (
        f"<p>Over {results['data']['samples']:,} samples of the split {escape(results['data']['split'])}; what has no "
        "label does not count. ▲ higher is better, ▼ lower is better.</p>"
    )
    if baselines:
        text += (
            "<p>Behind the score of a baseline stands the gain over it: how much better (+) or worse (-) this model "
            "is, in percent of that score.</p>"
        )
    head = ["task", "metric", "#this model", *(f"#{_words(baseline['label'])}" for baseline in baselines)]
    return text + table(head, rows) + _gains(results)


def _gains(results: Mapping[str, Any]) -> str:
    """One row for each baseline: the gain over it in both conventions, and who loses."""
    rows = []
    for baseline in results["baselines"]:
        gain = baseline["gain"]
        cells = [
            th(_words(baseline["label"])),
            td(_short(baseline["parameters"]), number=True),
            td(_change(gain["delta_task"]), number=True, raw=True),
            td(_signed(gain["delta_metric"]), number=True),
            td(f"{gain['tasks_worse']} of {len(gain['per_task'])}", number=True),
            td(f"{gain['worst_task']} {_signed(gain['worst_gain'])}"),
        ]
        rows.append("".join(cells))
    head = ["against", "#parameters", "#delta_task", "#delta_metric", "#tasks worse", "worst task"]
    note = (
        '<p class="note">delta_task is the mean over tasks of the mean gain of each, higher is better; delta_metric is '
        "minus the mean gain over all metrics, lower is better. This model has "
        f"{_short(results['model']['parameters'])} parameters.</p>"
    )
    return f"<h3>Gain over the baselines</h3>{table(head, rows)}{note}" if rows else ""


def _cost(results: Mapping[str, Any]) -> str:
    tables = results["cost"]
    batches = sorted(tables, key=int)
    runs: dict[str, list[list[Mapping[str, Any]]]] = {}  # run -> per batch its rows
    for i, batch in enumerate(batches):
        for row in tables[batch]:
            runs.setdefault(row["run"], [[] for _ in batches])[i].append(row)
    rows = []
    for run, groups in runs.items():
        first = groups[0]
        name = run if first[0]["task"] is None else f"{run}, mean of {len(first)}"
        cells = [th(name), td(_short(_average(first, "flops") / first[0]["batch"]), number=True)]
        cells += [td(_bar(_average(first, "relative_flops")), number=True, raw=True)]
        cells += [td(_short(_average(first, "parameters")), number=True)]
        cells += [td(f"{1e3 * _average(group, 'seconds'):.1f}", number=True) for group in groups]
        rows.append("".join(cells))
    head = ["runs", "#FLOPs per sample", "#of all tasks", "#parameters", *(f"#ms, batch {batch}" for batch in batches)]
    flops = _mean(results, "one task", "relative_flops")
    text = f"<p>Running one task alone takes {flops:.0%} of the FLOPs of all tasks (mean over tasks).</p>"
    worst = max((value for row in results["agreement"].values() for value in row.values()), default=None)
    if worst is not None:
        verdict = "It is the same computation" if worst <= AGREES else "It should be the same computation but is not"
        text += (
            f"<p>{verdict}: the largest difference between a task's prediction in the full pass and alone or extracted "
            f"is <b>{worst:.1e}</b> of the largest value predicted.</p>"
        )
    if results["dense"]:
        dense = results["dense"]
        text += (
            f"<p>Dense: an untrained {escape(dense['name'])} of width {width_of(dense['args'])}, which has the "
            f"parameters of this model but no experts ({_short(dense['parameters'])} against "
            f"{_short(results['model']['parameters'])}).</p>"
        )
    note = (
        '<p class="note">A multiply-add is 2 FLOPs. Times are medians of interleaved rounds on '
        f"{escape(results['versions']['device'])}.</p>"
    )
    return text + table(head, rows) + note + _cost_per_task(results, batches)


def _cost_per_task(results: Mapping[str, Any], batches: Sequence[str]) -> str:
    found = {(batch, row["run"], row["task"]): row for batch in batches for row in results["cost"][batch]}
    runs = {"one task": "in the full model", "one task extracted": "extracted", "dense, one task extracted": "dense"}
    runs = {run: name for run, name in runs.items() if any(run == other for _, other, _ in found)}
    head = ["one task", "#FLOPs per sample", "#of all tasks", "#parameters, extracted"]
    head += [f"#ms, batch {batch}, {name}" for batch in batches for name in runs.values()]
    rows = []
    for task in (task["name"] for task in results["tasks"]):
        row = found[batches[0], "one task", task]
        extracted = found.get((batches[0], "one task extracted", task), row)
        cells = [th(task), td(_short(row["flops"] / row["batch"]), number=True)]
        cells += [td(_bar(row["relative_flops"]), number=True, raw=True)]
        cells += [td(_short(extracted["parameters"]), number=True)]
        for batch in batches:
            timed = [found.get((batch, run, task)) for run in runs]
            cells += [td("" if row is None else f"{1e3 * row['seconds']:.1f}", number=True) for row in timed]
        rows.append("".join(cells))
    return f"<h3>Per task</h3>{table(head, rows)}"


def _predictions(results: Mapping[str, Any], pictures: Pictures) -> str:
    cards = []
    for task, figure in pictures.predictions.items():
        scores = [
            f"{_words(metric)} {format_metric(value, results['metric_info'][task][metric]['unit'])}"
            for metric, value in results["metrics"].get(task, {}).items()
        ]
        cards.append(picture(figure, task, "".join(scores[:1]), f"{task}: input, prediction, truth of some samples"))
    return f'<div class="gallery">{"".join(cards)}</div>' if cards else ""


def _experts(results: Mapping[str, Any], pictures: Pictures) -> str:
    usage, routing = results["usage"], results["routing"]
    if not usage:
        return "<p>This model has no expert layer.</p>"
    text = (
        "<p>Share of the tokens' expert choices that fall on each expert, for every task; a row sums to 100 %. Bars "
        "show the load of each expert, all tasks together. Lines mark even use: dashed over the bars, white on the "
        "scale. All layers share one scale.</p>"
        "<p>The mutual information I(task; expert) is 0 where all tasks use the experts alike, and grows as each task "
        "gets experts of its own. The load entropy is 100 % where every expert serves as many tokens; a dead expert "
        "serves less than 1 % of that.</p>"
    )
    cards = "".join(
        picture(figure, layer, _diagnosis(routing[layer]), f"{layer}: share of expert choices per task and expert")
        for layer, figure in pictures.usage.items()
    )
    maps = "".join(picture(figure, caption, "", caption) for caption, figure in pictures.maps.items())
    if maps:
        maps = f'<h3>The first expert of every patch</h3><div class="gallery">{maps}</div>'
    tables = "".join(
        f"<h3>{escape(layer)}</h3>"
        + table(
            ["task", *(f"#{e}" for e in range(len(entry["slots"][0])))],
            [
                th(task) + "".join(td(_number(share, ".1%"), number=True) for share in row)
                for task, row in zip((*entry["tasks"], "all"), (*entry["slots"], routing[layer]["load"]), strict=True)
            ],
        )
        for layer, entry in usage.items()
    )
    return (
        f'{text}{_layers(routing)}<div class="gallery wide">{cards}</div>{maps}{_gates(pictures)}'
        f"{_similarity(pictures)}{_pruned(results.get('pruned') or {}, pictures)}"
        f"{_activity(results.get('activity') or {}, pictures)}"
        f"<details><summary>The heat maps as numbers</summary>{tables}</details>"
    )


def _gates(pictures: Pictures) -> str:
    """The weights each task's gate gives, and how they came about."""
    cards = "".join(
        picture(figure, layer, "", f"{layer}: weight of each expert per task")
        for layer, figure in pictures.gates.items()
    )
    curves = "".join(picture(figure, caption, "", caption) for caption, figure in pictures.curves.items())
    text = (
        "<p>A bar is the mean weight that a task's gate gives an expert, the line on it the standard deviation over "
        "samples: without lines the gate looks at the task alone.</p>"
    )
    return f'<h3>Gates</h3>{text}<div class="gallery wide">{cards}{curves}</div>' if cards else ""


def _similarity(pictures: Pictures) -> str:
    """How alike the routing of every two tasks is."""
    cards = "".join(
        picture(figure, name, "", f"{name}: similarity of tasks by routing")
        for name, figure in pictures.similarity.items()
    )
    text = (
        "<p>The cosine between the gate weight of two tasks over the experts: 1 for the same mixture, 0 for experts "
        "that have nothing in common.</p>"
    )
    return f'<h3>Tasks that route alike</h3>{text}<div class="gallery wide">{cards}</div>' if cards else ""


def _pruned(pruned: Mapping[str, Mapping[str, Any]], pictures: Pictures) -> str:
    """What is left of each task when the experts it uses least go."""
    if not pruned:
        return ""
    rows = []
    for task, found in pruned.items():
        kept = sum(len(layer["kept"]) for layer in found["layers"].values())
        experts = sum(layer["experts"] for layer in found["layers"].values())
        dropped = max(layer["dropped_mass"] for layer in found["layers"].values())
        cells = [td(f"{kept} of {experts}", number=True), td(f"{dropped:.1%}", number=True)]
        cells += [td(_short(found["parameters"]), number=True), td(_bar(found["share"]), number=True, raw=True)]
        rows.append(th(task) + "".join(cells))
    mass = next(iter(pruned.values()))["mass"]
    text = (
        f"<p>One task extracted without the experts that have the least of its gate weight, up to {mass:.0%} of it per "
        "layer on the first samples. A cross marks an expert that is gone; colour is the share it had. What that costs "
        "in accuracy <code>moe_mtl.prune(..., held_out=samples)</code> measures.</p>"
    )
    cards = "".join(
        picture(figure, layer, "", f"{layer}: experts kept and dropped per task")
        for layer, figure in pictures.kept.items()
    )
    head = ["task", "#experts left", "#gate weight gone, at most", "#parameters", "#of the extracted model"]
    return f'<h3>What pruning removes</h3>{text}{table(head, rows)}<div class="gallery wide">{cards}</div>'


def _activity(activity: Mapping[str, Mapping[str, Any]], pictures: Pictures) -> str:
    """What the units of the experts do."""
    if not activity:
        return ""
    rows = [
        th(name)
        + td(f"{found['silent']:.0%}", number=True)
        + td(f"{found['dead']:.0%}", number=True)
        + td(_number(found["diversity"], ".2f"), number=True)
        for name, found in activity.items()
    ]
    text = (
        "<p>A silent activation is zero, or below 1 % of the layer's root mean square; a dead unit is silent on at "
        "least 99 % of the samples. Diversity is the mean distance between the outputs of two experts, over the "
        "largest such.</p>"
    )
    cards = "".join(
        picture(figure, name, "", f"{name}: units and outputs") for name, figure in pictures.activity.items()
    )
    head = ["experts", "#silent activations", "#dead units", "#diversity"]
    return f'<h3>Units of the experts</h3>{text}{table(head, rows)}<div class="gallery wide">{cards}</div>'


def _layers(routing: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per layer with what its usage says."""
    columns = {
        "#I(task; expert), nats": ("mutual_information", ".3f"),
        "#of the possible": ("mutual_information_share", ".0%"),
        "#of choices alone, nats": ("slot_information", ".3f"),
        "#load entropy": ("load_entropy", ".0%"),
        "#dead experts": ("dead_experts", "d"),
        "#never chosen": ("unused_experts", "d"),
        "#router entropy, nats": ("gate_entropy", ".2f"),
    }
    rows = [
        th(layer) + "".join(td(_number(found[key], form), number=True) for key, form in columns.values())
        for layer, found in routing.items()
    ]
    return table(["layer", *columns], rows)


def _diagnosis(found: Mapping[str, Any]) -> str:
    """The sentence under a heat map."""
    return (
        f"I(task; expert) {_number(found['mutual_information'], '.2f')} nats, "
        f"{_number(found['mutual_information_share'], '.0%')} of the possible; load entropy "
        f"{_number(found['load_entropy'], '.0%')}; dead experts: {found['dead_experts']} of {len(found['load'])}"
    )


def _run(results: Mapping[str, Any]) -> str:
    weights = results["weights"]
    facts = {
        "date": results["date"],
        "architecture": results["model"]["name"],
        "model folder": results["model"]["folder"],
        "weights": f"{weights['file']}, {weights['bytes']:,} bytes, {weights['dtype']}",
        "sha256": weights["sha256"],
        "data": json.dumps(results["data"]["spec"]),
        "recipe": (results["recipe"] or {}).get("recipe"),
        "seed": results.get("seed"),
        **results["versions"],
    }
    rows = [th(str(name)) + td(str(value)) for name, value in facts.items() if value is not None]
    recipe = escape(json.dumps(results["recipe"], indent=2)) if results.get("recipe") else ""
    details = (
        f"<details><summary>The recipe it was trained with</summary><pre>{recipe}</pre></details>" if recipe else ""
    )
    return table([], rows, facts=True) + details


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _mean(results: Mapping[str, Any], run: str, key: str) -> float:
    """Mean of a column of the cost table over the tasks of one kind of run, at the smallest batch; 0 without any."""
    tables = results["cost"]
    rows = [row for row in tables[min(tables, key=int)] if row["run"] == run]
    return _average(rows, key) if rows else 0.0


def _average(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _bar(share: float) -> str:
    return f'<span class="bar" style="--share:{min(share, 1):.3f}"></span><span class="share">{share:.0%}</span>'


def _change(gain: float | None) -> str:
    """A gain in percent, coloured, with its sign for who cannot tell the colours."""
    if gain is None:
        return ""
    kind = "better" if gain > 0 else "worse" if gain < 0 else "same"
    return f'<span class="change {kind}">{_signed(gain)}</span>'


def _signed(percent: float) -> str:
    return f"{percent:+.1f} %"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _short(number: float) -> str:
    """1234567 as 1.23 M."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * factor:  # what three digits round up
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


def _words(name: str) -> str:
    return name.replace("_", " ")
