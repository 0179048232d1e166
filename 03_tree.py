"""03: where did the K responses part ways?

LEAF (Low-rank Exploration with Adaptive Forking) is GRPO that credits parts of a response, its
spans, instead of all its tokens alike. Low-rank: it trains a LoRA (05). Forking: responses tend to
part where the model is surprised. They were sampled independently; nothing branched meanwhile.
This file cuts the K responses to a prompt into spans; 04 credits them.

Surprisal is -log of the probability of a sampled token, in nats (02). Where it is high, the model
had given most of its probability to other tokens: LEAF takes this for a decision. It puts a
boundary before each of the most surprising tokens, some distance apart. A boundary is a number of
tokens, b: it lies after the first b tokens.

A prompt has one list of boundaries. Each comes from one response that was surprised there, but all
K are compared at it. Those with the same first b tokens have made the same choices so far. If they
are two or more, they form a node. All members of a node are cut at b, surprised or not, so that
their common choices get one credit, from the mean reward of all who made them (04). There may be
several nodes at b, with different beginnings. In some of them perhaps nobody was surprised; they
are cut there all the same, even inside a word. A response that shares its first b tokens with no
other is not cut at b, even if its own surprise put the boundary there.

Responses that are together at b are together at each earlier boundary. So nodes lie inside nodes: a
tree. And a response is cut at the first few boundaries, as long as it has company, and at none of
the later ones. A span is what it has before its first cut, between two cuts, or after the last: the
tail. A response without a cut is all tail.

Sizes   K responses, T tokens in the longest (EOS included), B fork budget (the most boundaries), J
        nodes (the root, all K at b = 0, is not stored)
Reads   RUN/surprisal.pt; RUN/rollouts.pt: responses, lengths and, for the picture, texts and ends
        (where in its text each token ends)
Writes  RUN/tree.pt, per prompt: boundaries (<= B,) int64, ascending; nodes: boundary (J,) int64,
        members (J, K) bool, True for the responses in a node
Run     python 03_tree.py                                        demo: about 1 s
        python 03_tree.py --fork-budget 4 --show 7               more boundaries, prompt 7 drawn
Differs from the paper (arXiv 2606.07610): nothing. Steps 2 and 3 (nodes) in the README's list.
"""
from collections import namedtuple
from importlib import import_module

import torch

sampling = import_module("01_sample")  # its last part, shared by all: files, flags, errors

def select_boundaries(surprisal, lengths, B):
    """Step 2: up to B boundaries before the most surprising tokens. They are D or more apart, so
    that not all lie at one place: D is the length of the parts into which B even cuts would divide
    the shortest response, but at least 2. b >= 1, because b = 0 is shared by all.

    surprisal (K, T) nats, lengths (K,) -> list of int, ascending. Tokens count from 0. Here D is 2,
    so token 3, the second most surprising, is too close to token 2:

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
    """Step 3: the nodes at a boundary, each a group of two or more responses that share their first
    `boundary` tokens: a list of lists of int, in order of their first member. One of fewer tokens
    is compared whole. So identical ones are a node beyond their end, too.

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

def pack_tree(boundaries, groups, K):
    """boundaries (list of int), groups[j] the nodes at boundaries[j] -> an entry of tree.pt."""
    node_boundary = []
    members = []
    for b, nodes in zip(boundaries, groups):
        for node in nodes:
            node_boundary.append(b)
            members.append([i in node for i in range(K)])
    return {"boundaries": torch.tensor(boundaries, dtype=torch.int64),
            "nodes": {"boundary": torch.tensor(node_boundary, dtype=torch.int64),
                      "members": torch.tensor(members, dtype=torch.bool).view(-1, K)}}  # J may be 0

def unpack_tree(prompt_tree):
    """An entry of tree.pt -> boundaries (list of int), groups (the nodes at each of them)."""
    nodes_at = {b: [] for b in prompt_tree["boundaries"].tolist()}
    nodes = prompt_tree["nodes"]
    for b, members in zip(nodes["boundary"].tolist(), nodes["members"]):
        nodes_at[b].append(members.nonzero().squeeze(1).tolist())
    return list(nodes_at), list(nodes_at.values())

# The picture of a tree, in 03 and 04.
Row = namedtuple("Row", "branch members level start end")
PICTURE_WIDTH = 58  # characters, without the columns of numbers

def tree_rows(boundaries, groups, lengths, parent=None, level=0, start=0, indent=""):
    """Yields the lines of the picture that lie below a node, as Rows. parent: the responses in that
    node (None: all K). branch: what is drawn in front of the text. members: the responses on this
    line. start, end: its tokens are start to end - 1, none if identical responses have ended.
    level: how many cuts come before it. So boundaries[level] is where a node is cut, and
    spans[i][level] is the span of response i (04)."""
    parent = parent or list(range(len(lengths)))
    nodes = groups[level] if level < len(groups) else []
    children = [members for members in nodes if members[0] in parent]  # then all of them are
    in_node = {i for members in children for i in members}
    alone = [[i] for i in parent if i not in in_node]
    children = sorted(children + alone)
    for members in children:
        is_last = members == children[-1]
        is_node = len(members) > 1
        length = int(lengths[members[0]])
        end = min(length, boundaries[level]) if is_node else length
        yield Row(indent + ("└─ " if is_last else "├─ "), members, level, start, end)
        if is_node:
            deeper = indent + ("   " if is_last else "│  ")
            yield from tree_rows(boundaries, groups, lengths, members, level + 1, end, deeper)

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

def parse_args():
    parser = sampling.stage_parser(__doc__)
    add = parser.add_argument
    add("--fork-budget", type=sampling.number(int, 0), default=2, help="B, boundaries per prompt")
    add("--show", type=sampling.number(int, 0), default=0, help="prompt to draw, from 0")
    return parser.parse_args()

def main(args):
    # Read.
    rollouts = sampling.load_stage(args.run, "rollouts")
    scores = sampling.load_stage(args.run, "surprisal", rollouts)
    shown = shown_rollout(rollouts, args.show)

    # Find the boundaries and nodes of every prompt.
    trees = []
    surprisals = [prompt["surprisal"] for prompt in scores["prompts"]]
    for rollout, surprisal in zip(rollouts["prompts"], surprisals):
        lengths = rollout["lengths"]
        if not surprisal.isfinite().all():
            raise sampling.UserError(f"a surprisal of {rollout['id']} is NaN or infinite")
        boundaries = select_boundaries(surprisal, lengths, args.fork_budget)
        groups = [group_prefixes(rollout["responses"], lengths, b) for b in boundaries]
        trees.append(pack_tree(boundaries, groups, len(lengths)))

    # Write.
    meta = {**rollouts["meta"], "fork_budget": args.fork_budget}
    sampling.save_stage(args.run, "tree", meta, trees)

    # Show one tree.
    num_nodes = sum(len(prompt_tree["nodes"]["boundary"]) for prompt_tree in trees)
    print(f"{len(trees)} prompts, {num_nodes / len(trees):.1f} nodes each -> {args.run}/tree.pt")
    boundaries, groups = unpack_tree(trees[args.show])
    print_prompt(shown, "n  surprisal")
    for row in tree_rows(boundaries, groups, shown["lengths"]):
        line = f"{span_text(shown, row)} {len(row.members):4}"
        if row.start < row.end:
            line += f" {surprisals[args.show][row.members[0], row.start]:10.2f}"
        print(line)
    print("\nn responses share a span; its surprisal, in nats, is that of its first token.\n"
          f"Boundaries, in tokens: {boundaries}")

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
