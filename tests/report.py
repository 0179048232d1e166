"""What happened in a run? One page with its trees, curves and forks.

For each prompt of the round the page plays the clip and draws the tree of the K responses, each
span coloured by the advantages that LEAF and GRPO give it, on one scale, and outlined where the
two differ in sign. Below are the curves of training and evaluation, of several runs if they are
given, and how often boundaries fork.

Reads   RUN/rollouts.pt, surprisal.pt, tree.pt, advantages.pt, train.csv, eval.csv: what is there
Writes  RUN/report.html, of the first run: it needs no network, and no other file but the clips
A curve is the mean of all runs with the same --method: give runs that differ in their seed alone.
Run     python tests/report.py                                            demo: 3 s
        python tests/report.py --run runs/leaf-0 --run runs/grpo-0        their curves together
report.png is a picture of it: chromium --headless --hide-scrollbars --window-size=1000,680
  --screenshot=tests/demo/report.png "file://$PWD/runs/demo/report.html#39"
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

TRAINING = {"reward": "mean reward", "kl": "KL to the reference, nats", "clipped": "share clipped",
            "length": "tokens a response", "grad_norm": "gradient norm"}
EVALUATION = {"bleu_sampled": "BLEU, sampled", "bleu_greedy": "BLEU, greedy",
              "exact_match": "exact match"}

def load_stages(run):
    """The stage files of a run: a dict of those that are there, a sentence for each other one."""
    stages = {}
    missing = []
    for name in ("rollouts", "surprisal", "tree", "advantages"):
        try:
            stages[name] = sampling.load_stage(run, name, stages.get("rollouts"))
        except sampling.UserError as error:
            missing.append(str(error))
    return (stages if "rollouts" in stages else {}), missing

def prompt_data(stages, number, run, embed_audio):
    """What the page shows of one prompt, as plain lists and numbers."""
    rollout = stages["rollouts"]["prompts"][number]
    lengths = rollout["lengths"].tolist()
    data = {"prompt": rollout["prompt"], "reference": rollout["reference"],
            "audio": audio_source(rollout["audio"], run, embed_audio),
            "tokens": token_texts(rollout)}
    if "surprisal" in stages:
        surprisal = stages["surprisal"]["prompts"][number]["surprisal"]
        data["surprisal"] = [[round(nats, 2) for nats in row[:length]]
                             for row, length in zip(surprisal.tolist(), lengths)]
    if "tree" in stages:
        scores = stages["advantages"]["prompts"][number] if "advantages" in stages else None
        prompt_tree = stages["tree"]["prompts"][number]
        data["boundaries"] = prompt_tree["boundaries"]
        rows = tree.tree_rows(prompt_tree["boundaries"], prompt_tree["groups"], lengths)
        data["rows"] = [row_data(row, scores) for row in rows]
    return data

def token_texts(rollout):
    """What each token adds to the text of its response: K lists of str. Rollouts from elsewhere
    may not say; then these are the token ids."""
    if "ends" not in rollout:
        return [[f"{token} " for token in row[:length]] for row, length in
                zip(rollout["responses"].tolist(), rollout["lengths"].tolist())]
    tokens = []
    for text, ends, length in zip(rollout["texts"], rollout["ends"].tolist(),
                                  rollout["lengths"].tolist()):
        starts = [0, *ends]
        tokens.append([text[starts[t]:ends[t]] for t in range(length)])
    return tokens

def row_data(row, scores):
    """A span of the tree; its numbers are sums over its n responses, as 04 prints them."""
    data = {"members": row.members, "level": row.level, "start": row.start, "end": row.end}
    if scores:
        data["value"] = round(advantage.mean_reward(scores["rewards"], row.members), 3)
        if row.start < row.end:
            data["credit"] = round(sum(scores["spans"][i][row.level][2] for i in row.members), 3)
            for method in ("leaf", "grpo"):
                data[method] = round(scores[method][row.members, row.start].sum().item(), 3)
    return data

def audio_source(path, run, embed_audio):
    """The address of a clip for a page in `run`: relative to it, or the clip itself."""
    if not embed_audio:
        return quote(os.path.relpath(path, run))
    content = base64.b64encode(Path(path).read_bytes()).decode()
    return f"data:audio/{Path(path).suffix[1:]};base64,{content}"

def wilson(hits, total, z=1.96):
    """The 95% Wilson interval of a share hits / total: (low, high)."""
    share = hits / total
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + (z / total) ** 2 / 4)
    scale = 1 + z * z / total
    return (middle - reach) / scale, (middle + reach) / scale

def forks_section(stages):
    """How many boundaries fork (have a node), how many are usable (rewards differ there), where."""
    places = []  # of those that fork, as a share of the mean length
    usable = 0
    total = 0
    for number, prompt_tree in enumerate(stages["tree"]["prompts"]):
        boundaries = prompt_tree["boundaries"]
        groups = prompt_tree["groups"]
        mean_length = stages["rollouts"]["prompts"][number]["lengths"].float().mean().item()
        total += len(boundaries)
        places += [b / mean_length for b, nodes in zip(boundaries, groups) if nodes]
        if "advantages" in stages:
            rewards = stages["advantages"]["prompts"][number]["rewards"].tolist()
            usable += advantage.count_forks(groups, rewards)[1]
    if total == 0:
        return ""
    lines = share_line("fork: two or more responses share their first tokens", len(places), total)
    if "advantages" in stages:
        lines += share_line("are usable: the rewards of such responses differ", usable, total)
    counts = [0] * 10
    for place in places:
        counts[min(9, int(10 * place))] += 1
    bars = [f'<i style="height:{100 * n / max(1, *counts):.0f}%"><b>{n}</b></i>' for n in counts]
    return (f'<section><h2>Forks</h2>{lines}<div class="bars">{"".join(bars)}</div>'
            "<p>Where they fork, from the first token to the mean length and beyond.</p></section>")

def share_line(label, hits, total):
    """A share in words, as HTML, with its interval as if boundaries were independent."""
    low, high = wilson(hits, total)
    return (f"<p><strong>{hits / total:.1%}</strong> of {total} boundaries {label} (95%: {low:.1%} "
            f"to {high:.1%}).</p>")

def read_table(path):
    """The rows of a CSV file that have a number of steps: a list of dicts of str."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [row for row in csv.DictReader(lines) if (row.get("step") or "").isdecimal()]

def evaluated_alike(rows):
    """The rows of eval.csv with the settings of the last one, and these settings, a str."""
    settings = [[row.get(name) for name in ("manifest", "prompts", "temperature")] for row in rows]
    alike = [row for row, row_settings in zip(rows, settings) if row_settings == settings[-1]]
    manifest, prompts, temperature = settings[-1]
    return alike, f"{prompts} prompts of {manifest}, temperature {temperature}."

def curves_section(title, note, rows, columns):
    """Rows of train.csv or eval.csv, a chart per column, with a note above."""
    charts = "".join(chart(label, rows, column) for column, label in columns.items())
    return (f'<section><h2>{title}</h2><p class="dim">{html.escape(note)}</p>'
            f'<div class="charts">{charts}</div></section>')

def values_by_method(rows, column):
    """The numbers in a column, a list per method and step: {method: {step: values}}. The base,
    which does not learn, has the same values at the first step and the last."""
    points = {}
    for row in rows:
        if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?", row.get(column) or ""):
            steps = points.setdefault(row["method"], {})
            steps.setdefault(int(row["step"]), []).append(float(row[column]))
    if "base" in points:
        every_step = [step for steps in points.values() for step in steps]
        values = next(iter(points["base"].values()))
        points["base"] = {min(every_step): values, max(every_step): values}
    return points

def coordinates(steps, values, limits):
    """The corners of a line in a chart of 300 x 120 units, a list of "x,y"."""
    first, last, low, high = limits
    corners = []
    for step, value in zip(steps, values):
        x = 6 + 288 * (step - first) / max(1, last - first)
        y = 114 - 104 * (value - low) / ((high - low) or 1)
        corners.append(f"{x:.1f},{y:.1f}")
    return corners

def chart(label, rows, column):
    """One chart as SVG, a line per method: the mean of its runs, in a band from the lowest to the
    highest of them. Empty where no row has a number in this column."""
    points = values_by_method(rows, column)
    if not points:
        return ""
    every_step = [step for steps in points.values() for step in steps]
    every_value = [value for steps in points.values() for values in steps.values()
                   for value in values]
    limits = (min(every_step), max(every_step), min(every_value), max(every_value))
    shapes = ""
    names = ""
    for method in sorted(points):
        color = method if method in ("base", "leaf", "grpo") else "other"
        steps = sorted(points[method])
        runs = [points[method][step] for step in steps]  # their values, a list per step
        means = [statistics.fmean(values) for values in runs]
        top = coordinates(steps, map(max, runs), limits)
        bottom = coordinates(steps, map(min, runs), limits)
        line = coordinates(steps, means, limits)
        shapes += (f'<g class="{color}"><polygon points="{" ".join(top + bottom[::-1])}"/>'
                   f'<polyline points="{" ".join(line)}"/>'
                   f'<circle r="3" transform="translate({line[-1]})"/></g>')
        names += f'<span class="{color}">{html.escape(method)} {means[-1]:.4g}</span>'
    first, last, low, high = limits
    return (f'<figure><figcaption>{label}</figcaption><svg viewBox="0 0 300 120" role="img" '
            f'aria-label="{label}">{shapes}</svg><p><span>{low:.3g} to {high:.3g}</span>'
            f'<span>update {first} to {last}</span></p><p class="names">{names}</p></figure>')

def build_page(runs, embed_audio=False):
    """The page, as HTML, for the runs (list of Path); the trees are those of the first one."""
    stages, missing = load_stages(runs[0])
    rollouts = stages.get("rollouts", {"meta": {}, "prompts": []})
    count = len(rollouts["prompts"])
    prompts = [prompt_data(stages, number, runs[0], embed_audio) for number in range(count)]
    sections = [f'<p class="missing">{html.escape(sentence)}</p>' for sentence in missing]
    if "tree" in stages:
        sections.append(forks_section(stages))
    updates = [row for run in runs for row in read_table(run / "train.csv")]
    if updates:
        note = "Rewards are those of the responses sampled in 01."
        sections.append(curves_section("Training", note, updates, TRAINING))
    evaluations = [row for run in runs for row in read_table(run / "eval.csv")]
    if evaluations:
        alike, settings = evaluated_alike(evaluations)
        sections.append(curves_section("Evaluation", settings, alike, EVALUATION))
    meta = rollouts["meta"]
    summary = f"round {meta['round']}, {count} prompts, {meta['model']}" if count else ""
    data = json.dumps(prompts, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(", ".join(map(str, runs))), "SUMMARY": html.escape(summary),
             "SECTIONS": "".join(sections), "DATA": data}
    return re.sub("@([A-Z]+)@", lambda mark: parts[mark[1]], PAGE)

def main():
    parser = argparse.ArgumentParser(description="Write a page that shows a run.")
    parser.add_argument("--run", action="append", help="folder of a run (default: runs/demo)")
    parser.add_argument("--audio", action="store_true", help="put the clips into the page")
    args = parser.parse_args()
    runs = [Path(run) for run in args.run or ["runs/demo"]]
    try:
        for run in runs:
            if not run.is_dir():
                raise sampling.UserError(f"there is no run {run}")
        page = runs[0] / "report.html"
        sampling.save_file(page, build_page(runs, args.audio))
        print(f"{page}, {page.stat().st_size / 1e6:.1f} MB: open it in a browser")
    except (sampling.UserError, OSError) as error:
        sys.exit(sampling.printable(f"report.py: {error}"))

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title><style>
:root { color-scheme: light dark; --ink: #1c2330; --dim: #667085; --line: #d5dae3; --paper: #fbfbfd;
  --card: #fff; --warn: #d9731a; --leaf: #1f8a5f; --grpo: #a14fc0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #363d4a;
  --paper: #14171d; --card: #1c2029; --warn: #f0a45c; --leaf: #5fd0a0; --grpo: #cf94e8; } }
* { box-sizing: border-box; margin: 0; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 70rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin-bottom: .5rem; }
section, #controls > * { border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card); }
section { padding: 1rem; margin: 1rem 0; } #controls input { width: 5rem; }
#controls { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .8rem; }
#controls > * { font: inherit; color: inherit; padding: .2rem .6rem; max-width: 100%; }
audio { width: 100%; max-width: 26rem; height: 2.2rem; display: block; margin-bottom: .5rem; }
#prompt, #reference, .text, .tokens { white-space: pre-wrap; overflow-wrap: anywhere; }
#reference, .dim, figure p { color: var(--dim); font-size: .85rem; }
.tokens { margin: .3rem 0; }
.missing { border-left: 3px solid var(--warn); padding-left: .6rem; margin: .5rem 0; }
.tree, .tree ul { list-style: none; padding-left: 1.1rem; } .tree li { position: relative; }
.tree li::before, .tree li:not(:last-child)::after { content: ""; position: absolute; left: -.8rem;
  top: 0; width: .6rem; height: 1rem; border: 0 solid var(--line); border-left-width: 1.5px; }
.tree li::before { border-bottom-width: 1.5px; border-bottom-left-radius: .4rem; }
.tree li:not(:last-child)::after { height: 100%; }
.row { display: flex; gap: .4rem; align-items: flex-start; padding: .12rem 0; cursor: pointer; }
.row .text { flex: 1; border-radius: .3rem; padding: 0 .35rem; min-width: 0; }
.row b { font: 500 .82rem/1.5 system-ui; width: 3.6rem; text-align: right; padding: .1rem .3rem;
  border-radius: .3rem; font-variant-numeric: tabular-nums; flex: none; }
.row b.n { width: 1.8rem; }
.opposed .advantage { outline: 2px solid var(--ink); } .head { color: var(--dim); }
#legend { margin-top: .5rem; } #detail { min-height: 3em; }
.boundary { border-left: 2px solid var(--ink); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; }
figcaption { font-weight: 500; } svg { width: 100%; border-bottom: 1px solid var(--line); }
figure p { display: flex; justify-content: space-between; flex-wrap: wrap; gap: .8rem; }
polyline { fill: none; stroke: currentColor; stroke-width: 2; } circle { fill: currentColor; }
polygon { fill: currentColor; opacity: .18; } .base { color: var(--dim); stroke-dasharray: 4 4; }
.leaf { color: var(--leaf); } .grpo { color: var(--grpo); } .other { color: var(--warn); }
.bars { display: flex; gap: .3rem; align-items: flex-end; height: 6rem; margin: 2rem 0 .3rem; }
.bars i { flex: 1; background: var(--dim); border-radius: .2rem .2rem 0 0; text-align: center; }
.bars b { position: relative; top: -1.3rem; font: .75rem system-ui; color: var(--dim); }
@media (max-width: 600px) { .row { flex-wrap: wrap; justify-content: flex-end; }
  body, section { padding: .6rem; } .row .text { flex-basis: 100%; } }
</style><meta name="viewport" content="width=device-width, initial-scale=1"></head><body>
<h1>@TITLE@</h1><p class="dim">@SUMMARY@</p>
<section id="look"><div id="controls">
<button onclick="move(-1)" aria-label="previous prompt">&larr;</button>
<input id="number" type="number" min="0" aria-label="number of the prompt"><span id="count"></span>
<button id="next" onclick="move(1)" aria-label="next prompt">&rarr;</button>
<select id="sort" onchange="sort()" aria-label="order"><option value="number">by number</option>
<option value="opposed">LEAF against GRPO first</option></select>
<select id="view" onchange="draw()" aria-label="view"><option value="tree">advantages</option>
<option value="tokens">surprisal</option></select></div>
<audio id="audio" controls preload="none" aria-label="the clip"></audio>
<p id="prompt" dir="auto"></p><p id="reference" dir="auto"></p><div id="main"></div>
<p id="legend" class="dim"></p><p id="detail" class="dim" aria-live="polite"></p></section>
@SECTIONS@
<script type="application/json" id="data">@DATA@</script><script>
const prompts = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const order = prompts.map((_, number) => number);
let place = 0;  // in the order
const legends = {
  tree: "Blue is pushed up, orange down; outlined: LEAF and GRPO disagree. n responses share a "
    + "span. Nats: the surprisal of its first token. Value: the mean reward of the n responses. "
    + "LEAF, GRPO: the sums of their advantages.",
  tokens: "The darker, the more surprising. A bar marks a boundary." };
function make(tag, className, textContent, parent) {
  const element = Object.assign(document.createElement(tag), { className, textContent });
  parent.append(element);
  return element;
}
function tint(advantage, most) {
  const alpha = advantage && 0.12 + 0.6 * Math.abs(advantage) / most;
  return advantage < 0 ? `rgba(230, 115, 15, ${alpha})` : `rgba(45, 110, 225, ${alpha})`;
}
function opposed(row) {  // how far the two are apart where one pushes up and the other down
  return row.leaf * row.grpo < 0 ? Math.abs(row.leaf - row.grpo) : 0;
}
function drawRow(prompt, row, most, parent) {
  const line = make("div", opposed(row) ? "row opposed" : "row", "", parent);
  const tokens = prompt.tokens[row.members[0]].slice(row.start, row.end);
  const empty = row.start < row.end ? "(no text)" : "(end)";
  const text = make("span", "text", tokens.join("") || empty, line);
  text.dir = "auto";
  text.style.background = tint(row.leaf, most);
  make("b", "n", row.members.length, line);
  const nats = row.start < row.end && prompt.surprisal ?
    prompt.surprisal[row.members[0]][row.start] : undefined;
  for (const x of [nats, row.value]) make("b", "", x === undefined ? "" : x.toFixed(2), line);
  for (const advantage of [row.leaf, row.grpo]) {
    const cell = make("b", "advantage", advantage === undefined ? "" : advantage.toFixed(2), line);
    cell.style.background = tint(advantage, most);
  }
  const facts = [`responses ${row.members.join(", ")}`];
  if (row.leaf !== undefined)
    facts.push(`sums over them: credit ${row.credit}, LEAF ${row.leaf}, GRPO ${row.grpo}`);
  line.tabIndex = 0;
  line.onclick = line.onfocus = line.onmouseenter = () => {
    get("detail").textContent = facts.join("; ");
  };
}
function drawTree(prompt) {
  const advantages = prompt.rows.flatMap(row => [row.leaf || 0, row.grpo || 0]);
  const most = Math.max(1e-9, ...advantages.map(Math.abs));
  const head = make("div", "row head", "", get("main"));
  make("span", "text", "", head);
  make("b", "n", "n", head);
  for (const name of ["nats", "value", "LEAF", "GRPO"]) make("b", "", name, head);
  const lists = [make("ul", "tree", "", get("main"))];
  for (const row of prompt.rows) {
    const item = make("li", "", "", lists[row.level]);
    drawRow(prompt, row, most, item);
    if (row.members.length > 1) lists[row.level + 1] = make("ul", "", "", item);
  }
}
function drawTokens(prompt) {
  prompt.tokens.forEach((tokens, k) => {
    const line = make("p", "tokens", "", get("main"));
    line.dir = "auto";
    tokens.forEach((text, t) => {
      const isBoundary = (prompt.boundaries || []).includes(t);
      const token = make("span", isBoundary ? "boundary" : "", text || "\u00b7", line);
      if (!prompt.surprisal) return;
      const nats = prompt.surprisal[k][t];
      token.style.background = `rgba(160, 60, 200, ${Math.min(0.7, nats / 4).toFixed(2)})`;
      token.title = `${nats.toFixed(2)} nats`;
      token.onclick = () => { get("detail").textContent = token.title; };
    });
  });
}
function draw() {
  const prompt = prompts[order[place]];
  get("number").value = order[place];
  for (const name of ["prompt", "reference"]) get(name).textContent = prompt[name];
  get("audio").src = prompt.audio;
  get("main").replaceChildren();
  get("detail").textContent = "";
  const isTree = get("view").value === "tree" && prompt.rows;
  get("legend").textContent = isTree ? legends.tree : legends.tokens;
  if (isTree) drawTree(prompt); else drawTokens(prompt);
  history.replaceState(null, "", "#" + order[place]);
}
function show(number) { place = Math.max(0, order.indexOf(number)); draw(); }
function move(step) { show(order[(place + step + order.length) % order.length]); }
function sort() {
  const score = number => Math.max(0, ...(prompts[number].rows || []).map(opposed));
  const isByNumber = get("sort").value === "number";
  order.sort((a, b) => (isByNumber ? 0 : score(b) - score(a)) || a - b);
  show(order[0]);
}
get("number").onchange = () => show(Number(get("number").value));
onkeydown = event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.target === document.body && !event.altKey && step) move(step);
};
get("count").textContent = `0 to ${prompts.length - 1}`;
if (prompts.length) show(Number(location.hash.slice(1)) || 0); else get("look").remove();
</script></body></html>
"""

if __name__ == "__main__":
    main()
