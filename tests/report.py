"""What does LEAF see in a run that GRPO does not? One page with its trees and curves.

For each prompt of the round the page plays the clip, draws the tree of the K responses, and lists
them whole, each token coloured by LEAF's or GRPO's advantage, or by its surprisal. Outlined is a
poor ending in a good branch: its value is below its branch's, which is above the mean of all. The
page opens where LEAF pushes one down and GRPO up. In the curves each run has its own line. With
--seeds runs of one method are one, their mean, in a band from lowest to highest, if their settings
(adapter/training.json, so not the code) differ in the seed alone.

Reads   RUN/rollouts.pt, surprisal.pt, tree.pt, advantages.pt, train.csv, eval.csv: what is there
Writes  RUN/report.html, of the first run: it needs no network, and no other file but the clips
Run     python tests/report.py                                            demo: 3 s
        python tests/report.py --audio                                    to mail it: with its clips
        python tests/report.py --run runs/leaf-0 --run runs/leaf-1 --seeds
tests/demo/report.png is #39, by chromium --headless --hide-scrollbars --window-size=860,865
"""
import argparse
import base64
import csv
import html
import json
import math
import os
import re
import statistics
import sys
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sampling = import_module("01_sample")
tree = import_module("03_tree")
advantage = import_module("04_advantage")

COLUMNS = {"reward": ("mean reward", 1), "alike": ("prompts with equal rewards", 1),
           "kl": ("KL to the reference, nats", 0.01), "clipped": ("share of tokens clipped", 0.2),
           "length": ("tokens a response", 10), "grad_norm": ("gradient norm", 1),
           "bleu_sampled": ("sampled BLEU, %", 100), "bleu_greedy": ("greedy BLEU, %", 100),
           "exact_match": ("exact match, %", 100)}  # and the least range: little shall look little
STAGES = ("rollouts", "surprisal", "tree", "advantages")
COLORS = ("#1f7a55, #5fd0a0", "#a14fc0, #cf94e8", "#a35b00, #e0ac4e", "#00728a, #4fc3d9",
          "#c2185b, #ff86ac", "#5b6472, #aab4c4")  # of lines: on white, on black
LEFT, RIGHT, TOP, BOTTOM = 46, 292, 22, 146  # the corners of a chart, in an SVG of 320 x 168

def load_stages(run):
    """The stage files of a run: a dict of those that are there, a sentence for each other one."""
    stages = {}
    missing = []
    for name in STAGES:
        try:
            stages[name] = sampling.load_stage(run, name, stages.get("rollouts"))
        except sampling.UserError as error:
            missing.append(str(error))
    return (stages if "rollouts" in stages else {}), missing

def prompt_data(stages, number, run, embed_audio):
    """What the page shows of one prompt, as plain lists and numbers."""
    rollout, surprisal, prompt_tree, scores = [
        stages[name]["prompts"][number] if name in stages else None for name in STAGES]
    data = {"prompt": rollout["prompt"], "reference": rollout["reference"],
            "audio": audio_source(rollout["audio"], run, embed_audio),
            "tokens": token_texts(rollout), "responses": identical_responses(rollout)}
    if surprisal:
        data["surprisal"] = [[round(nats, 2) for nats in row[:len(tokens)]] for row, tokens in
                             zip(surprisal["surprisal"].tolist(), data["tokens"])]
    if scores:
        data["rewards"] = [round(reward, 6) for reward in scores["rewards"].tolist()]
        data["grpo"] = [round(row[0], 6) for row in scores["grpo"].tolist()]  # of all its tokens
        data["responses"].sort(key=lambda members: -data["rewards"][members[0]])
    if prompt_tree:
        data["rows"] = tree_data(prompt_tree, rollout, scores, data["responses"])
        data["says"] = what_one_sees(data) if scores else ""
    return data

def token_texts(rollout):
    """What each token adds to its response's text: K lists of str; or its id, without "ends"."""
    lengths = rollout["lengths"].tolist()
    if "ends" not in rollout:
        return [[f"{token} " for token in row[:length]]
                for row, length in zip(rollout["responses"].tolist(), lengths)]
    return [[text[start:end] for start, end in zip([0, *ends], ends[:length])]
            for text, ends, length in zip(rollout["texts"], rollout["ends"].tolist(), lengths)]

def identical_responses(rollout):
    """The numbers of the responses, those with the same tokens in one list: [[0, 3], [1], ...]."""
    copies = {}
    for k, (row, length) in enumerate(zip(rollout["responses"].tolist(), rollout["lengths"])):
        copies.setdefault(tuple(row[:length]), []).append(k)
    return list(copies.values())

def tree_data(prompt_tree, rollout, scores, responses):
    """The lines of a tree, its root first. Identical endings are one line, empty spans none."""
    copies = {k: members for members in responses for k in members}
    lines = [{"members": sorted(copies), "level": -1, "start": 0, "end": 0}]
    above = {-1: lines[0]}  # the last line of each level
    if scores:
        lines[0]["value"] = round(advantage.mean_reward(scores["rewards"], copies), 6)
    for row in tree.tree_rows(prompt_tree["boundaries"], prompt_tree["groups"],
                              rollout["lengths"].tolist()):
        members = row.members if len(row.members) > 1 else copies[row.members[0]]
        if row.start < row.end and row.members[0] == members[0]:
            line = {"members": members, "level": row.level, "start": row.start, "end": row.end}
            if scores:
                line |= span_data(line, scores, above[row.level - 1]["value"], lines[0]["value"])
            above[row.level] = line
            lines.append(line)
    return lines

def span_data(line, scores, parent_value, root_value):
    """A span's value, credit and advantages (means of its copies); "against", if it is poor."""
    members = line["members"]
    value = round(advantage.mean_reward(scores["rewards"], members), 6)
    credits = [scores["spans"][i][line["level"]][2] for i in members]
    data = {"value": value, "parent": parent_value, "credit": round(statistics.fmean(credits), 3)}
    for method in ("leaf", "grpo"):
        data[method] = round(scores[method][members, line["start"]].mean().item(), 6)
    if min(parent_value - value, parent_value - root_value) > 2e-6:  # less is rounding
        data["against"] = min(-data["leaf"], data["grpo"])  # how far LEAF pushes down and GRPO up
    return data

def poor_endings(prompt):
    """The lines of poor endings in good branches, first where LEAF goes most against GRPO."""
    poor = [line for line in prompt.get("rows", []) if "against" in line]
    return sorted(poor, key=lambda line: -line["against"])

def ranked(prompts):
    """The numbers of the prompts, first where LEAF goes most against GRPO in a poor ending."""
    ranks = [[-line["against"] for line in poor_endings(prompt)[:1]] for prompt in prompts]
    return sorted(range(len(prompts)), key=lambda number: ranks[number] or [math.inf])

def what_one_sees(data):
    """A sentence or two about a prompt."""
    if not poor_endings(data):
        return "Here is no poor ending in a good branch."
    line = poor_endings(data)[0]
    tokens = data["tokens"][line["members"][0]]
    before = "".join(tokens[:line["start"]]).strip()
    ending = "".join(tokens[line["start"]:line["end"]]).strip()
    leaf, grpo = [f"{'up' if line[method] > 0 else 'down'} ({line[method]:+.2f})"
                  for method in ("leaf", "grpo")]
    return (f"After “{before}” the ending “{ending}” earns {line['value']:.2f}, the branch "
            f"{line['parent']:.2f}, all responses {data['rows'][0]['value']:.2f}. "
            f"LEAF pushes it {leaf}, GRPO {grpo}.")

def audio_source(path, run, embed_audio):
    """The address of a clip for a page in `run`: relative to it, or the clip itself."""
    if not embed_audio:
        return quote(os.path.relpath(path, run))
    content = base64.b64encode(Path(path).read_bytes()).decode()
    return f"data:audio/{Path(path).suffix[1:]};base64,{content}"

def read_table(run, file):
    """The rows of train.csv or eval.csv, dicts of str, with their run, and a title: only rows with
    the same can be compared. Of a round, step and method the last: a fork has copied the others."""
    path = run / file
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows = {}
    for row in csv.DictReader(lines):
        title = "Training (rewards are those of the responses sampled in 01)"
        if file == "eval.csv":
            title = (f"Evaluation on {row.get('prompts')} prompts of {row.get('manifest')}, "
                     f"temperature {row.get('temperature')}")
        key = (title, *[row.get(name) or "" for name in ("round", "step", "method")])
        if key[1].isdecimal() and key[2].isdecimal():
            rows[key] = {**row, "run": run, "title": title, "method": key[3]}
    return list(rows.values())

def settings(run):
    """How a run was trained: its training.json, without its seed and how far it is."""
    path = run / "adapter" / "training.json"
    with sampling.as_user_error(f"{path} is corrupt"):
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    progress = ("seed", "id", "policy_id", "round", "seen", "step")
    return {name: value for name, value in state.items() if name not in progress}

def name_lines(rows, runs, seeds):
    """The rows, each with the name of its line. The base of a run begins each line of the run."""
    parent = os.path.commonpath([run.absolute().parent for run in runs])
    methods = {run: {row["method"] for row in rows if row["run"] == run} for run in runs}
    named = []
    for run in methods:
        for method in sorted(methods[run] - {"base"}) or ["base"]:
            band = [other for other in methods if other == run or seeds
                    and method in methods[other] and settings(other) == settings(run)]
            line = f"{', '.join(os.path.relpath(other, parent) for other in band)}: {method}"
            named += [{**row, "line": line} for row in rows
                      if row["run"] == run and row["method"] in (method, "base")]
    return named

def curve_sections(runs, seeds):
    """The charts of training, and those of each kind of evaluation, as HTML."""
    rows = sum((read_table(run, file) for file in ("train.csv", "eval.csv") for run in runs), [])
    parts = {title: name_lines([row for row in rows if row["title"] == title], runs, seeds)
             for title in dict.fromkeys(row["title"] for row in rows)}
    names = list(dict.fromkeys(row["line"] for part in parts.values() for row in part))
    sections = []
    for title, part in parts.items():
        charts = "".join(chart(part, column, *COLUMNS[column], names) for column in COLUMNS)
        if sections and "<h2>Evaluation" in sections[-1]:
            title += ": not to be compared with the one above"
        sections.append(f'<section><h2>{html.escape(title)}</h2><div class="charts">{charts}</div>'
                        "</section>")
    return sections

def chart(rows, column, label, least, names):
    """One chart as SVG, a line per name; empty where no row has a number in this column."""
    lines = {}  # {name: {step: the values of its runs}}
    for row in rows:
        if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?", row.get(column) or ""):
            steps = lines.setdefault(row["line"], {})
            steps.setdefault(int(row["step"]), []).append(float(row[column]))
    if not lines:
        return ""
    every_value = [x for steps in lines.values() for values in steps.values() for x in values]
    ticks = round_numbers(every_value, least)
    frame = (min(map(min, lines.values())), max(map(max, lines.values())), ticks[0], ticks[-1])
    shapes = axes(ticks, rows, frame)
    legend = ""
    for name, steps in lines.items():
        color = f'style="--color: light-dark({COLORS[names.index(name) % len(COLORS)]})"'
        top, bottom, line = [[place(step, f(steps[step]), frame) for step in sorted(steps)]
                             for f in (max, min, statistics.fmean)]
        shapes += (f'<g {color}><polygon points="{" ".join(top + bottom[::-1])}"/>'
                   f'<polyline points="{" ".join(line)}"/>'
                   f'<circle r="3" transform="translate({line[-1]})"/></g>')
        ends = dict.fromkeys(f"{statistics.fmean(steps[x]):.4g}" for x in (min(steps), max(steps)))
        legend += f'<li {color}><i></i>{html.escape(name)} <b>{" to ".join(ends)}</b></li>'
    return (f'<figure><figcaption>{label}</figcaption><svg viewBox="0 0 320 168" role="img" '
            f'aria-label="{label}">{shapes}</svg><ul>{legend}</ul></figure>')

def place(step, value, frame):
    """Where a point is in a chart: "x,y"; frame: first and last step, lowest and highest tick."""
    first, last, low, high = frame
    x = LEFT + (RIGHT - LEFT) * (step - first) / max(1, last - first)
    return f"{x:.1f},{BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low):.1f}"

def round_numbers(values, least):
    """Ticks: evenly spaced, `least` or more in all, from 0 or below all values to above them."""
    low = min(0, *values)
    high = max(0, low + least, *values)
    power = 10 ** math.floor(math.log10((high - low) / 5))
    space = next(power * factor for factor in (1, 2, 5, 10) if 5.01 * power * factor > high - low)
    count_below = math.ceil(-low / space - 1e-6)
    count_above = math.ceil(high / space - 1e-6)
    return [space * i for i in range(-count_below, count_above + 1)]

def axes(ticks, rows, frame):
    """The ticks, a line at zero, a mark where a round begins, and the first and last update."""
    shapes = "".join(f'<text x="{x}" y="163">update {step}</text>'
                     for step, x in {frame[1]: RIGHT, frame[0]: LEFT}.items())
    for tick in ticks:
        y = place(frame[0], tick, frame).split(",")[1]
        end = LEFT - 4 if abs(tick) > 1e-9 else RIGHT
        shapes += (f'<path d="M{LEFT} {y}H{end}"/>'
                   f'<text class="tick" x="{LEFT - 7}" y="{y}">{tick:.3g}</text>')
    starts = sorted({int(row["round"]): int(row["step"]) for row in reversed(rows)}.items())
    for number, step in starts[::len(starts) // 6 + 1]:
        x = place(step, 0, frame).split(",")[0]
        shapes += (f'<path class="mark" d="M{x} {BOTTOM}V{TOP}"/><text x="{x}" y="{TOP - 8}">'
                   f'{f"round {number}" if number else "base"}</text>')
    return shapes

def build_page(runs, embed_audio=False, seeds=False):
    """The page, as HTML, for the runs (list of Path); the trees are those of the first one."""
    stages, missing = load_stages(runs[0])
    count = len(stages["rollouts"]["prompts"]) if stages else 0
    prompts = [prompt_data(stages, number, runs[0], embed_audio) for number in range(count)]
    sections = [f'<p class="missing">{html.escape(sentence)}</p>' for sentence in missing]
    meta = stages["rollouts"]["meta"] if stages else {}
    summary = f"Trees: {runs[0]}, round {meta['round']}, {meta['model']}" if stages else ""
    data = json.dumps({"prompts": prompts, "ranked": ranked(prompts)}, ensure_ascii=False,
                      separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(", ".join(map(str, runs))), "SUMMARY": html.escape(summary),
             "SECTIONS": "".join(sections + curve_sections(runs, seeds)), "DATA": data,
             "LAST": str(count - 1)}
    return re.sub("@([A-Z]+)@", lambda mark: parts[mark[1]], PAGE)

def main():
    parser = argparse.ArgumentParser(description="Write a page that shows a run.")
    parser.add_argument("--run", action="append", help="folder of a run (default: runs/demo)")
    parser.add_argument("--seeds", action="store_true", help="one line for the seeds of a method")
    parser.add_argument("--audio", action="store_true", help="put the clips into the page")
    args = parser.parse_args()
    runs = [Path(run) for run in args.run or ["runs/demo"]]
    page = runs[0] / "report.html"
    try:
        for run in runs:
            if not run.is_dir():
                raise sampling.UserError(f"there is no run {run}")
        sampling.save_file(page, build_page(runs, args.audio, args.seeds))
    except (sampling.UserError, OSError) as error:
        sys.exit(sampling.printable(f"report.py: {error}"))
    print(f"{page}, {page.stat().st_size / 1e6:.1f} MB: open it in a browser")

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --ink: light-dark(#1c2330, #e6e9ef);
  --dim: light-dark(#5d6676, #9aa4b5); --rule: light-dark(#868e9b, #6f7888);
  --card: light-dark(#ffffff, #1c2029); --paper: light-dark(#f1f3f6, #12151a);
  --up: light-dark(#2d6ee1, #3c78e6); --down: light-dark(#e6730f, #c45c08);
  --surprising: light-dark(#a03cc8, #a050c8); }
* { box-sizing: border-box; margin: 0; padding: 0; font: inherit; color: inherit; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: auto; padding: .5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; } h2, #says, figure b { font-weight: 600; } ul { list-style: none; }
section { padding: .6rem 1rem; margin: .8rem 0; background: var(--card); border-radius: .6rem; }
.dim, figure li { color: var(--dim); font-size: .85rem; } #says, .dim { margin: .4rem 0; }
#controls, form { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
button, select, #number { border: 1px solid var(--rule); border-radius: .4rem; padding: .2rem .6rem;
  background: var(--card); } summary { cursor: pointer; }
audio { width: 100%; max-width: 26rem; height: 2.2rem; display: block; margin: .5rem 0; }
#prompt, #reference, .text { white-space: pre-wrap; unicode-bidi: plaintext; }
.missing, .detail { border-left: 3px solid var(--rule); padding-left: .6rem; margin: .3rem 0; }
.row { display: grid; grid-template-columns: 1fr 2.4rem repeat(3, 3.4rem); gap: .3rem;
  padding: .1rem 0; border-bottom: 1px solid var(--paper); } .poor { outline: 2px solid; }
.row b { text-align: right; padding: 0 .3rem; font-variant-numeric: tabular-nums; }
#tree ul ul ul { border-left: 1px solid var(--rule); margin-left: .3rem; padding-left: .8rem; }
[data-colour=leaf] .token, .leaf { background: var(--leaf); } .mark { stroke-dasharray: 2 3; }
[data-colour=grpo] .token, .grpo { background: var(--grpo); } path { stroke: var(--rule); }
[data-colour=nats] .token { background: var(--nats); &:empty::before { content: "·"; } }
#legend b { padding: 0 .4rem; color: var(--ink); } .span + .span { border-left: 2px solid; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
svg { width: 100%; } text { font-size: 11px; fill: var(--dim); text-anchor: middle; }
.tick { text-anchor: end; dominant-baseline: middle; } circle, polygon { fill: var(--color); }
polyline { fill: none; stroke: var(--color); stroke-width: 2; } polygon { opacity: .18; }
figure i { display: inline-block; width: 1rem; margin: .3rem; border-top: 3px solid var(--color); }
@media (max-width: 600px) { .text { grid-column: 1 / -1; } .text + b { grid-column: 2; } }
</style></head><body><h1>@TITLE@</h1><p class="dim">@SUMMARY@</p><section id="look">
<div id="controls"><button onclick="move(-1)" aria-label="previous" id="previous">&larr;</button>
<input id="number" onchange="show(this.value)" inputmode="numeric" size="3" aria-label="prompt">
<span>of 0 to @LAST@</span><button onclick="move(1)" aria-label="next" id="next">&rarr;</button>
<select id="sort" aria-label="order"><option value="ranked">LEAF against GRPO first</option>
<option value="number">by number</option></select><form id="switch" onchange="recolour()">
<label><input type="radio" name="colour" value="leaf" checked> LEAF</label>
<label><input type="radio" name="colour" value="grpo"> GRPO</label>
<label><input type="radio" name="colour" value="nats"> surprisal</label></form>
<span id="wrong" role="status"></span></div>
<audio id="audio" controls preload="none" aria-label="the clip"></audio><p id="prompt"></p>
<p>reference: <bdi id="reference"></bdi></p><p id="says" aria-live="polite"></p>
<div class="row dim"><b></b><b>n</b><b>value</b><b>LEAF</b><b>GRPO</b></div><div id="tree"></div>
<p class="dim">The responses, whole:</p><div id="responses"></div><p id="legend" class="dim"></p>
<p class="dim"><span class="poor">Outlined</span>: a poor ending in a good branch, one above the
mean of all. n responses share a span; ×n: identical. value: their mean reward. LEAF, GRPO: the mean
of the n advantages (04 prints the sum). A bar: a cut. Open a line for more.</p></section>
@SECTIONS@<script type="application/json" id="data">@DATA@</script><script>
const { prompts, ranked } = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const notes = {
  leaf: "Blue is pushed up, orange down. LEAF: each span has its own advantage.",
  grpo: "Blue is pushed up, orange down. GRPO: one advantage a response. Stripes: a shared span.",
  nats: "Nats of surprisal. A boundary is before a very surprising token." };
let current = ranked[0];
function make(tag, className, textContent, parent) {
  return parent.appendChild(Object.assign(document.createElement(tag), { className, textContent }));
}
function paint(element, kind, numbers) {  // a stripe for each number
  const height = 100 / numbers.length;
  const stripes = numbers.sort((a, b) => b - a).map((number, i) => {
    const color = kind === "nats" ? "surprising" : number < 0 ? "down" : "up";
    const share = number ? 8 + 60 * Math.min(1, Math.abs(number) / 3) : 0;
    const tint = `color-mix(in srgb, var(--${color}) ${share}%, transparent)`;
    return `${tint} ${i * height}% ${(i + 1) * height}%`;
  });
  element.style.setProperty(`--${kind}`, `linear-gradient(${stripes.join(", ")})`);
}
function drawSpan(prompt, row, members, parent) {
  const span = make("span", "against" in row ? "span poor" : "span", "", parent);
  const texts = prompt.tokens[members[0]].slice(row.start, row.end);
  texts.forEach((text, i) => {
    const token = make("span", "token", text || (texts.join("") ? "" : "·"), span);
    paint(token, "leaf", [row.leaf]);
    paint(token, "grpo", members.map(k => prompt.grpo?.[k]));
    paint(token, "nats", [prompt.surprisal?.[members[0]][row.start + i]]);
  });
}
function drawLine(prompt, line, spans, members, numbers) {
  const text = make("span", "text", spans.length ? "" : "all responses", line);
  for (const row of spans) drawSpan(prompt, row, members, text);
  const isEnd = spans.at(-1)?.end === prompt.tokens[members[0]].length;
  make("b", "", members.length > 1 && isEnd ? `×${members.length}` : members.length, line);
  for (const name of ["value", "leaf", "grpo"])
    paint(make("b", name, numbers[name]?.toFixed(2), line), name, [numbers[name]]);
}
function drawResponse(prompt, members, parent) {
  const [k] = members;
  const rows = prompt.rows?.slice(1) || [{ members, start: 0, end: prompt.tokens[k].length }];
  const spans = rows.filter(row => row.members.includes(k));
  const numbers = { value: prompt.rewards?.[k], grpo: prompt.grpo?.[k] };
  drawLine(prompt, make("div", "row", "", parent), spans, members, numbers);
}
function drawTree(prompt) {
  const lists = [make("ul", "", "", get("tree"))];
  for (const row of prompt.rows) {
    const item = make("li", "", "", lists[row.level + 1]);
    const details = make("details", "", "", item);
    const line = make("summary", "row", "", details);
    drawLine(prompt, line, row.level < 0 ? [] : [row], row.members, row);
    details.addEventListener("toggle", () => drawDetail(prompt, row, details), { once: true });
    lists[row.level + 2] = make("ul", "", "", item);
  }
}
function drawDetail(prompt, row, parent) {
  const box = make("div", "detail", "", parent);
  const [k] = row.members;
  for (const members of prompt.responses)
    if (row.members.includes(members[0])) drawResponse(prompt, members, box);
  const nats = prompt.tokens[k].slice(row.start, row.end).map((text, i) =>
    `${text.trim() || "·"} ${prompt.surprisal?.[k][row.start + i]}`);
  if (nats.length) make("p", "dim", `Credit ${row.credit}. Nats: ${nats.join(", ")}`, box);
}
function recolour() {
  document.body.dataset.colour = get("switch").colour.value;
  const kind = document.body.dataset.colour;
  get("legend").replaceChildren();
  for (const number of kind === "nats" ? [0, 1, 2, 3] : [-3, -2, -1, 0, 1, 2, 3])
    paint(make("b", "token", number, get("legend")), kind, [number]);
  make("span", "", ` ${notes[kind]}`, get("legend"));
}
function show(number) {  // a text, from the box or the address
  const isPrompt = /^\\d+$/.test(number) && number < prompts.length;
  if (isPrompt) current = Number(number);
  const prompt = prompts[current];
  get("number").value = current;
  get("wrong").textContent = isPrompt ? "" : `There is no prompt ${number}.`;
  for (const name of ["prompt", "reference", "says"]) get(name).textContent = prompt[name];
  get("audio").src = prompt.audio;
  for (const name of ["tree", "responses"]) get(name).replaceChildren();
  if (prompt.rows) drawTree(prompt);
  for (const members of prompt.responses) drawResponse(prompt, members, get("responses"));
  history.replaceState(null, "", `#${current}`);
}
function move(step) {
  const order = get("sort").value === "ranked" ? ranked : [...prompts.keys()];
  show(order.at((order.indexOf(current) + step) % order.length));
}
get("sort").onchange = () => show(get("sort").value === "ranked" ? ranked[0] : current);
onhashchange = () => show(location.hash.slice(1));
onkeydown = event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && !event.altKey && !event.target.closest("input, select, audio")) move(step);
};
recolour();
if (prompts.length) show(location.hash.slice(1) || current); else get("look").remove();
</script></body></html>
"""

if __name__ == "__main__":
    main()
