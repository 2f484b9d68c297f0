"""The report page: one HTML file with the numbers `eval.py` measured, pictures of predictions, and expert usage.

Self-contained: pictures are inlined, nothing is loaded from the network, no script runs. It follows the reader's light
or dark setting, and wide tables scroll inside their own box on a phone.
"""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from moe_mtl.cost import AGREES
from moe_mtl.hub import replace_file
from moe_mtl.tasks import Task
from moe_mtl.viz import LayerUsage, expert_map, prediction_grid, top_expert, usage_figures

DPI = 180  # twice what a desktop page shows, so that pictures stay sharp on dense screens


@dataclass(frozen=True)
class Pictures:
    """Figures for the page, each set may be empty.

    Attributes:
        predictions: task name to its input, prediction and truth.
        usage: layer name to its task-by-expert heat map.
        maps: caption to a picture of the experts each patch uses.
    """

    predictions: Mapping[str, Figure] = field(default_factory=dict)
    usage: Mapping[str, Figure] = field(default_factory=dict)
    maps: Mapping[str, Figure] = field(default_factory=dict)


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
        ("Which experts each task uses", _usage(results, pictures)),
        ("Run", _run(results)),
    ]
    sections = [(title, body) for title, body in sections if body]
    title = f"{results['model']['name']} on {results['data']['name']}"
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    main = "".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>{body}</section>' for i, (name, body) in enumerate(sections)
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}</h1>{_headline(results)}<nav>{links}</nav></header>"
        f"<main>{main}</main></body></html>\n"
    )
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def draw(model: Any, tasks: Sequence[Task], samples: tuple, usage: Mapping[str, LayerUsage]) -> Pictures:
    """The pictures of a model: predictions, expert usage, and the first expert of every patch in the last layer.

    Args:
        model: has `tasks` and returns its routings.
        tasks: which of them to show.
        samples: images [b c h w], {task: prediction}, {task: target or None}, on the CPU.
        usage: of these tasks, from `ExpertUsage.compute`.
    """
    images, predictions, targets = samples
    names, ids = [task.name for task in tasks], {task.name: i for i, task in enumerate(model.tasks)}
    with torch.no_grad():
        _, routings = model(images.to(next(model.parameters()).device), tasks=names, return_routing=True)
    maps = {}
    for layer, routing in list(routings.items())[-1:]:  # the last layer, where the tasks have parted the most
        for start in range(0, len(names), 3) if routing.task is not None else ():
            group = names[start : start + 3]
            top = {n: top_expert(routing, ids[n], len(images), tuple(images.shape[-2:])).cpu() for n in group}
            maps[f"{layer}: {', '.join(group)}"] = expert_map(images, top, routing.num_experts)
    return Pictures(
        predictions={t.name: prediction_grid(t, images, predictions[t.name], targets.get(t.name)) for t in tasks},
        usage=usage_figures(usage, names),
        maps=maps,
    )


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
    if results.get("gain"):
        cards.append((f"{results['gain']['delta_task']:+.1f} %", "delta_task over the baseline"))
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in cards)
    trained = results.get("training")
    return f'<div class="cards">{boxes}</div>' + (f"<p>{escape(trained)}</p>" if trained else "")


def _scores(results: Mapping[str, Any]) -> str:
    baseline = (results.get("baseline") or {}).get("metrics", {})
    head = ["task", "metric", "#value", *(["#baseline"] if baseline else [])]
    rows = []
    for task, metrics in results["metrics"].items():
        for i, (metric, value) in enumerate(metrics.items()):
            info = results["metric_info"][task][metric]
            row = [_th(task, span=len(metrics))] if i == 0 else []
            row.append(_td(f"{'▲' if info['higher_is_better'] else '▼'} {_words(metric)}"))
            row.append(_td(format_metric(value, info["unit"]), number=True))
            if baseline:
                row.append(_td(format_metric(baseline.get(task, {}).get(metric), info["unit"]), number=True))
            rows.append("".join(row))
    gain = results.get("gain")
    text = (
        f"<p>Over {results['data']['samples']:,} samples of the split {escape(results['data']['split'])}; what has no "
        "label does not count. ▲ higher is better, ▼ lower is better.</p>"
    )
    if gain:
        text += (
            f"<p>Against the baseline, averaged over tasks: <b>{gain['delta_task']:+.2f} %</b> (delta_task, higher is "
            f"better); averaged over metrics: {gain['delta_metric']:+.2f} % (delta_metric, lower is better).</p>"
        )
    return text + _table(head, rows)


def _cost(results: Mapping[str, Any]) -> str:
    tables = results.get("cost", {})
    if not tables:
        return ""
    batches = sorted(tables, key=int)
    found = {(batch, row["run"], row["task"]): row for batch in batches for row in tables[batch]}
    head = ["runs", "#FLOPs per sample", "#of all tasks", "#parameters, extracted"]
    head += [name for batch in batches for name in (f"#ms, batch {batch}", "#extracted")]
    rows = []
    for task in (None, *(task["name"] for task in results["tasks"])):
        row = found[batches[0], "one task" if task else "all tasks", task]
        share = f'<span class="bar" style="--share:{row["relative_flops"]:.3f}"></span>{row["relative_flops"]:.0%}'
        cells = [_th(task or "all tasks"), _td(_short(row["flops"] / row["batch"]), number=True)]
        extracted = found.get((batches[0], "one task extracted", task))
        cells += [_td(share, number=True, raw=True)]
        cells += [_td(_short((extracted or row)["parameters"]), number=True)]
        for batch in batches:
            for run in ("one task", "one task extracted") if task else ("all tasks", ""):
                timed = found.get((batch, run, task))
                cells.append(_td(f"{timed['seconds'] * 1e3:.1f}" if timed else "", number=True))
        rows.append("".join(cells))
    flops, kept = (
        _mean(results, "one task", "relative_flops"),
        _mean(results, "one task extracted", "relative_parameters"),
    )
    sentence = f"Running one task alone takes {flops:.0%} of the FLOPs of all tasks"
    if kept:
        sentence += f"; extracted, it holds {kept:.0%} of the parameters"
    text = f"<p>{sentence} (means over tasks).</p>"
    worst = max((value for row in results.get("agreement", {}).values() for value in row.values()), default=None)
    if worst is not None:
        verdict = "It is the same computation" if worst <= AGREES else "It should be the same computation but is not"
        text += (
            f"<p>{verdict}: the largest difference between a task's prediction in the full pass and alone or extracted "
            f"is <b>{worst:.1e}</b> of the largest value predicted.</p>"
        )
    text += (
        '<p class="note">A multiply-add is 2 FLOPs. Times are medians of interleaved rounds on '
        f"{escape(results['versions'].get('device', 'this machine'))}.</p>"
    )
    return text + _table(head, rows)


def _predictions(results: Mapping[str, Any], pictures: Pictures) -> str:
    cards = []
    for task, figure in pictures.predictions.items():
        scores = [
            f"{_words(metric)} {format_metric(value, results['metric_info'][task][metric]['unit'])}"
            for metric, value in results["metrics"].get(task, {}).items()
        ]
        cards.append(_picture(figure, task, "".join(scores[:1]), f"{task}: input, prediction, truth of some samples"))
    return f'<div class="gallery">{"".join(cards)}</div>' if cards else ""


def _usage(results: Mapping[str, Any], pictures: Pictures) -> str:
    usage = results.get("usage", {})
    if not usage:
        return "<p>This model has no expert layer.</p>"
    text = (
        "<p>Share of the tokens' expert choices that fall on each expert, for every task; a row sums to 100 %. "
        "The white line on the scale marks even use. All layers share one scale.</p>"
    )
    cards = "".join(
        _picture(figure, layer, _most_used(usage[layer]), f"{layer}: share of expert choices per task and expert")
        for layer, figure in pictures.usage.items()
    )
    maps = "".join(_picture(figure, caption, "", caption) for caption, figure in pictures.maps.items())
    if maps:
        maps = f'<h3>The first expert of every patch</h3><div class="gallery">{maps}</div>'
    tables = "".join(
        f"<h3>{escape(layer)}</h3>"
        + _table(
            ["task", *(f"#{e}" for e in range(len(entry["slots"][0])))],
            [
                _th(task) + "".join(_td(_percent(share), number=True) for share in row)
                for task, row in zip(entry["tasks"], entry["slots"], strict=True)
            ],
        )
        for layer, entry in usage.items()
    )
    return (
        f'{text}<div class="gallery wide">{cards}</div>{maps}'
        f"<details><summary>The same as numbers, in percent</summary>{tables}</details>"
    )


def _run(results: Mapping[str, Any]) -> str:
    facts = {
        "date": results["date"],
        "model folder": results["model"]["folder"],
        "data": json.dumps(results["data"]["spec"]),
        "seed": results.get("seed"),
        **results["versions"],
    }
    rows = [_th(str(name)) + _td(str(value)) for name, value in facts.items() if value is not None]
    recipe = escape(json.dumps(results["recipe"], indent=2)) if results.get("recipe") else ""
    details = (
        f"<details><summary>The recipe it was trained with</summary><pre>{recipe}</pre></details>" if recipe else ""
    )
    return _table([], rows) + details


# ---- pieces ---------------------------------------------------------------------------------------------------------


def format_metric(value: float | None, unit: str = "") -> str:
    """A score with its unit: a share in percent, anything else with four significant digits; None where unlabelled."""
    if value is None or value != value:
        return "no labels"
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.4g}{'' if unit == '°' else ' '}{unit}".rstrip()


def _most_used(entry: Mapping[str, Any]) -> str:
    """The sentence under a heat map: how concentrated each task's use is."""
    shares = [sum(sorted(row, reverse=True)[:4]) for row in entry["slots"] if row[0] is not None]
    if not shares or len(entry["slots"][0]) <= 4:
        return ""
    return f"a task's 4 favourite experts take {min(shares):.0%} to {max(shares):.0%} of its choices"


def _mean(results: Mapping[str, Any], run: str, key: str) -> float | None:
    """Mean of a column of the cost table over the tasks of one kind of run, at the smallest batch."""
    tables = results.get("cost", {})
    rows = [row[key] for row in tables[min(tables, key=int)] if row["run"] == run] if tables else []
    return sum(rows) / len(rows) if rows else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _short(number: float) -> str:
    """1234567 as 1.23 M."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _th(text: str, span: int = 1) -> str:
    return f'<th scope="row" rowspan="{span}">{escape(text)}</th>'


def _td(text: str, number: bool = False, raw: bool = False) -> str:
    return f"<td{' class=number' if number else ''}>{text if raw else escape(text)}</td>"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table in a box that scrolls; a head that starts with # stands over numbers."""
    names = "".join(
        f'<th scope="col"{" class=number" if name[:1] == "#" else ""}>{escape(name.removeprefix("#"))}</th>'
        for name in head
    )
    top = f"<thead><tr>{names}</tr></thead>" if head else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table>{top}<tbody>{body}</tbody></table></div>'


def _picture(figure: Figure, title: str, caption: str, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    note = f"<span>{escape(caption)}</span>" if caption else ""
    return (
        f'<figure><img alt="{escape(description)}" src="data:image/png;base64,{data}" loading="lazy">'
        f"<figcaption><b>{escape(title)}</b>{note}</figcaption></figure>"
    )


_STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1b1b1f;--soft:#5a5a63;--line:#d9d9d4;--accent:#2d5fb0}
@media(prefers-color-scheme:dark){:root{--page:#16171a;--card:#212327;--ink:#ececea;--soft:#a9abb2;--line:#3a3d44;--accent:#86aef0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:76rem;background:var(--page);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 1rem}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p{max-width:46rem;margin:.5rem 0}
.note{color:var(--soft);font-size:.875rem}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin-top:1rem}
a{color:var(--accent)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.75rem}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.75rem 1rem}
.cards b{display:block;font-size:1.5rem;line-height:1.2}
.cards span{color:var(--soft);font-size:.875rem}
.scroll{overflow-x:auto;width:fit-content;max-width:100%;margin:.75rem 0;
 background:var(--card);border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;font-size:.875rem}
th,td{padding:.35rem .75rem;text-align:left;vertical-align:top;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:600}
th.number,td.number{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:inline-block;vertical-align:middle;width:5rem;height:.6rem;margin-right:.5rem;border-radius:2px;
 background:linear-gradient(var(--accent) 0 0) left/calc(var(--share)*100%) 100% no-repeat,var(--line)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem;align-items:start;margin-top:.75rem}
.gallery.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
figure{margin:0;background:#fff;border:1px solid var(--line);border-radius:8px;overflow:hidden}
figure img{display:block;width:100%;height:auto}
figcaption{padding:.5rem .75rem;background:var(--card);border-top:1px solid var(--line);font-size:.875rem}
figcaption b{margin-right:.75rem}
figcaption span{color:var(--soft)}
details{margin-top:1rem}
summary{cursor:pointer;color:var(--accent)}
pre{overflow-x:auto;padding:.75rem;
 background:var(--card);border:1px solid var(--line);border-radius:8px;font-size:.8125rem}
"""
