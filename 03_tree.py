"""03: where did the K responses part ways?

LEAF (Low-rank Exploration with Adaptive Forking) is GRPO that credits parts of a response, its
spans, instead of all its tokens alike. This file cuts the responses to a prompt into spans, 04
credits them, and 05 trains a LoRA (low-rank). Four responses, boundaries 2 and 5, | is a cut:

    token     0      1      2        3         4         5         6         7
    y0        You    have | at       this      moment  | twenty    messages  .
    y1        You    have | at       this      moment  | twelve    messages  .
    y2        You    have | no       messages  at        this      moment    .
    y3        There  are    twenty   messages  at        this      moment    .

Boundaries. Boundary b lies between token b - 1 and token b, counted from 0. Surprisal (02) is high
where the model had given most of its probability to other tokens. LEAF regards that as a decision,
and puts a boundary before each of the most surprising tokens of all K responses, some distance
apart: here before "no" in y2 and "twelve" in y1. None is at 0: there all K are together, the root.
A tree search would sample anew from each boundary; LEAF looks back at K complete responses.

Nodes. Responses with the same first b tokens form a node at b, if they are two or more. All of them
are cut at b, not only the one with the surprising token. They have read the same tokens, so at b
they faced the same distribution; one drew an unlikely token, the others did not. Their rewards will
show which was better (04): that is the comparison LEAF wants. Boundaries are chosen once for a
prompt, so other nodes at b are cut as well. A response that shares its first b tokens with no other
is not cut at b: nobody else faced the same choice. So a boundary may have no node.

Tree. Responses that are together at b are together at each earlier boundary, so nodes lie inside
nodes. A response is cut at each boundary up to where its prefix becomes unique. Its parts are its
spans; what follows its last cut is its tail. y0 has three spans, y2 two, and y3 is all tail.

Sizes   K responses, T tokens in the longest (with EOS), B boundaries at most (--fork-budget)
Reads   RUN/surprisal.pt; RUN/rollouts.pt: responses, lengths and, for the picture, texts and ends
        (where in its text each token ends)
Writes  RUN/tree.pt, per prompt: boundaries, a list of at most B int, ascending; groups: for each
        boundary the list of its nodes, each the list of its members, without the root
Run     python 03_tree.py                                        demo: about 1 s
        python 03_tree.py --fork-budget 4 --show 7               more boundaries, prompt 7 shown
Differs from the paper (arXiv 2606.07610): nothing. (Steps 2 and 3 of the README.)
"""
from collections import namedtuple
from importlib import import_module

import torch

sampling = import_module("01_sample")  # for its last part: files, flags and errors of all stages

def main(args):
    # Read.
    rollouts = sampling.load_stage(args.run, "rollouts")
    scores = sampling.load_stage(args.run, "surprisal", rollouts)
    shown = shown_rollout(rollouts, args.show)

    # Find the boundaries and nodes of every prompt.
    trees = []
    surprisals = [prompt["surprisal"] for prompt in scores["prompts"]]
    for rollout, surprisal in zip(rollouts["prompts"], surprisals):
        if not surprisal.isfinite().all():
            raise sampling.UserError(f"a surprisal of {rollout['id']} is NaN or infinite")
        boundaries = sorted(set(select_boundaries(surprisal, rollout["lengths"], args.fork_budget)))
        if not all(isinstance(b, int) and b >= 1 for b in boundaries):
            raise sampling.UserError(f"boundaries of {rollout['id']}: {boundaries}, not int from 1")
        groups = [group_prefixes(rollout["responses"], rollout["lengths"], b) for b in boundaries]
        trees.append({"boundaries": boundaries, "groups": groups})

    # Write.
    meta = {**rollouts["meta"], "fork_budget": args.fork_budget}
    sampling.save_stage(args.run, "tree", meta, trees)

    # Show one tree.
    num_nodes = sum(len(nodes) for prompt_tree in trees for nodes in prompt_tree["groups"])
    print(f"{len(trees)} prompts, {num_nodes / len(trees):.1f} nodes each -> {args.run}/tree.pt")
    boundaries = trees[args.show]["boundaries"]
    print_prompt(shown, "n  surprisal")
    for row in tree_rows(boundaries, trees[args.show]["groups"], shown["lengths"]):
        line = f"{span_text(shown, row)} {len(row.members):4}"
        if row.start < row.end:
            line += f" {surprisals[args.show][row.members[0], row.start]:10.2f}"
        print(line)
    print("\nn responses share a span; its surprisal, in nats, is that of its first token.\n"
          f"Boundaries, in tokens: {boundaries}")

def select_boundaries(surprisal, lengths, B):
    """Step 2: up to B boundaries before the most surprising tokens, D or more apart, so that not
    all lie at one place. surprisal (K, T) nats, lengths (K,) -> list of int, ascending.

    D = max(2, shortest length // (B + 1)): as far apart as B even cuts of the shortest response.
    Here D is 2, so token 3, the second most surprising, is too close to token 2:

    >>> select_boundaries(torch.tensor([[0.1, 0.2, 3.0, 2.0, 0.1, 1.0]]), torch.tensor([6]), B=2)
    [2, 5]
    """
    candidates = []
    for i, row in enumerate(surprisal.tolist()):
        for b in range(1, int(lengths[i])):
            candidates.append((-row[b], i, b))
    candidates.sort()  # highest surprisal first; ties: lower i, then lower b
    D = max(2, int(min(lengths)) // (B + 1))
    boundaries = []
    for _, _, b in candidates:
        if len(boundaries) == B:
            break
        if all(abs(b - kept) >= D for kept in boundaries):
            boundaries.append(b)
    return sorted(boundaries)

def group_prefixes(responses, lengths, boundary):
    """Step 3: the nodes at a boundary, each the list of two or more responses that share their
    first `boundary` tokens, in order of their first member.

    A response shorter than the boundary is compared whole, so identical short responses never part.
    Their spans beyond their end have no tokens, but count in the z-score all the same (04).

    responses (K, T) int64, 0 at padding; lengths (K,).

    >>> group_prefixes(torch.tensor([[5, 6, 7], [5, 6, 8], [9, 0, 0], [9, 0, 0]]),
    ...                torch.tensor([3, 3, 1, 1]), boundary=2)
    [[0, 1], [2, 3]]
    """
    sharing = {}  # prefix: the responses that begin with it
    for i, (row, length) in enumerate(zip(responses.tolist(), lengths.tolist())):
        prefix = tuple(row[:min(boundary, length)])
        sharing.setdefault(prefix, []).append(i)
    return [members for members in sharing.values() if len(members) > 1]

def parse_args():
    parser = sampling.stage_parser(__doc__)
    add = parser.add_argument
    add("--fork-budget", type=sampling.number(int, 0), default=2, help="B, boundaries per prompt")
    add("--show", type=sampling.number(int, 0), default=0, help="prompt to show, from 0")
    return parser.parse_args()

# -- The picture of a tree, here and in 04. Nothing about LEAF below this line. ------------------
PICTURE_WIDTH = 58  # characters, without the columns of numbers
Row = namedtuple("Row", "branch members level start end")

def tree_rows(boundaries, groups, lengths, members=None, level=0, start=0, indent=""):
    """Yields the lines below a node with these `members` (None: the root), as Rows. branch: what is
    drawn before the text; members: the responses on this line; level: how many cuts come before it,
    so that spans[i][level] is the span of response i (04); start, end: its tokens are start to
    end - 1, none if identical responses have ended."""
    members = members or list(range(len(lengths)))
    nodes = []
    if level < len(groups):
        nodes = [node for node in groups[level] if node[0] in members]  # nodes lie inside nodes
    in_nodes = {i for node in nodes for i in node}
    alone = [[i] for i in members if i not in in_nodes]
    children = sorted(nodes + alone)
    for child in children:
        is_last = child == children[-1]
        is_node = len(child) > 1
        length = int(lengths[child[0]])
        end = min(length, boundaries[level]) if is_node else length
        yield Row(indent + ("└─ " if is_last else "├─ "), child, level, start, end)
        if is_node:
            deeper = indent + ("   " if is_last else "│  ")
            yield from tree_rows(boundaries, groups, lengths, child, level + 1, end, deeper)

def span_text(rollout, row, width=PICTURE_WIDTH):
    """The left side of a line: branch and text, `width` characters, without the middle if long."""
    i = row.members[0]
    if "ends" in rollout:
        ends = [0, *rollout["ends"][i].tolist()]
        text = rollout["texts"][i][ends[row.start]:ends[row.end]]
    else:  # rollouts from elsewhere: token ids stand for the text
        text = " ".join(map(str, rollout["responses"][i, row.start:row.end].tolist()))
    text = sampling.printable(text).replace("\n", "·")
    if not text:  # an EOS token alone, or no token at all
        text = "(end)" if row.start == row.end else "(no text)"
    room = max(12, width - len(row.branch) - 2)
    if len(text) > room:
        text = f"{text[:room // 2]}…{text[len(text) - (room - 1) // 2:]}"
    return f"{row.branch + text:{width}}"

def shown_rollout(rollouts, number):
    """The rollout that --show asks for. UserError if there are not so many."""
    if number >= len(rollouts["prompts"]):
        raise sampling.UserError(f"--show {number}: there are {len(rollouts['prompts'])} prompts")
    return rollouts["prompts"][number]

def print_prompt(rollout, columns):
    """The lines above a tree: the prompt, its reference, and the names of the columns."""
    print(sampling.printable(f"\n{rollout['prompt']}\n  reference  {rollout['reference']}\n"))
    print(f"{'':{PICTURE_WIDTH}}    {columns}")

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
