"""03: where did the K responses part ways?

LEAF (Low-rank Exploration with Adaptive Forking) is GRPO that credits spans of a response instead
of all its tokens alike. This file cuts the K responses to a prompt into spans; 04 credits them.

A model that is surprised by its own token had others to choose from: it decided there. Surprisal
is -log of the token's probability, in nats (02). LEAF cuts the responses before their most
surprising tokens. Responses that agree on every token up to a cut have decided alike so far. They
form a node, and the nodes form a tree. Nothing branched while sampling.

A cut is called a fork boundary. It is a number of tokens, b, and lies between the tokens b-1 and b.
It is found in one response and applied to all K, because a node compares responses by their first
b tokens, and that takes one b for all. Other responses may be cut at an odd place, even inside a
word; a group that does not part there stays whole.

Sizes   K responses, T tokens in the longest, B fork budget, J nodes of the tree
Reads   RUN/rollouts.pt (responses, lengths; for the picture texts, ends), RUN/surprisal.pt
Writes  RUN/tree.pt, per prompt: boundaries (<= B,) int64, ascending; nodes: boundary (J,) int64,
        members (J, K) bool, True for the responses in a node
Run     python 03_tree.py                                        demo: about 1 s
        python 03_tree.py --fork-budget 4 --show 7               more boundaries, another picture
Differs from the paper: nothing. Steps are numbered as in the README.
"""
from collections import namedtuple
from importlib import import_module

import torch

sampling = import_module("01_sample")

def select_boundaries(surprisal, lengths, B):
    """Step 2: up to B boundaries before the most surprising tokens, each D or more from the others.
    A response has nothing to share in front of its first token, so b >= 1.

    surprisal (K, T) nats, lengths (K,) -> list of int, ascending.

    >>> select_boundaries(torch.tensor([[0.1, 0.2, 3.0, 2.0, 0.1, 1.0]]), torch.tensor([6]), B=2)
    [2, 5]
    """
    candidates = []
    for i, row in enumerate(surprisal.tolist()):
        for b in range(1, int(lengths[i])):
            candidates.append((-row[b], i, b))
    D = max(2, int(min(lengths)) // (B + 1))  # B of them fit in the shortest response
    boundaries = []
    for _, _, b in sorted(candidates):  # highest surprisal first; ties: lower i, then lower b
        if len(boundaries) == B:
            break
        if all(abs(b - kept) >= D for kept in boundaries):
            boundaries.append(b)
    return sorted(boundaries)

def group_prefixes(responses, lengths, boundary):
    """Step 3: the nodes at a boundary, each a group of two or more responses that share their first
    `boundary` tokens: a list of lists of int, in order of their first member. A response that is
    shorter is compared by all of its tokens, so identical short ones form a node past their end.

    responses (K, T) int64, lengths (K,).

    >>> group_prefixes(torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 0]]), torch.tensor([3, 3, 2]), 2)
    [[0, 1]]
    """
    groups = {}
    for i, (row, length) in enumerate(zip(responses.tolist(), lengths.tolist())):
        prefix = tuple(row[:min(boundary, length)])
        groups.setdefault(prefix, []).append(i)
    return [members for members in groups.values() if len(members) > 1]

def pack_tree(boundaries, groups, K):
    """boundaries (list of int), groups[j] the nodes at boundaries[j] -> a prompt of tree.pt."""
    node_boundary = [b for b, nodes in zip(boundaries, groups) for _ in nodes]
    members = [[i in node for i in range(K)] for nodes in groups for node in nodes]
    return {"boundaries": torch.tensor(boundaries, dtype=torch.int64),
            "nodes": {"boundary": torch.tensor(node_boundary, dtype=torch.int64),
                      "members": torch.tensor(members, dtype=torch.bool).view(-1, K)}}

def unpack_tree(prompt_tree):
    """A prompt of tree.pt -> boundaries (list of int), groups (the nodes at each of them)."""
    groups = {b: [] for b in prompt_tree["boundaries"].tolist()}
    nodes = prompt_tree["nodes"]
    for b, members in zip(nodes["boundary"].tolist(), nodes["members"]):
        groups[b].append(members.nonzero().squeeze(1).tolist())
    return list(groups), list(groups.values())

# The picture of a tree, in 03 and 04.
Row = namedtuple("Row", "branch members level start end")

def tree_rows(boundaries, groups, lengths, parent=None, level=0, start=0, indent=""):
    """The lines of the picture below a node (`parent`, the root if None): Rows of branch, the lines
    drawn in front (str), and a span: members hold the tokens start..end as their level-th span.
    Identical responses that end inside their node have a tail without tokens."""
    parent = parent or list(range(len(lengths)))
    nodes = groups[level] if level < len(groups) else []
    children = [members for members in nodes if members[0] in parent]
    in_node = {i for members in children for i in members}
    children += [[i] for i in parent if i not in in_node]
    for members in sorted(children):
        is_last = members == max(children)
        is_node = len(members) > 1
        length = int(lengths[members[0]])
        end = min(length, boundaries[level]) if is_node else length
        yield Row(indent + ("└─ " if is_last else "├─ "), members, level, start, end)
        if is_node:
            deeper = indent + ("   " if is_last else "│  ")
            yield from tree_rows(boundaries, groups, lengths, members, level + 1, end, deeper)

def span_text(rollout, row, width=58):
    """The left side of a line: branch and text, `width` characters, without the middle if long."""
    i = row.members[0]
    if "ends" in rollout:
        ends = [0, *rollout["ends"][i].tolist()]
        text = rollout["texts"][i][ends[row.start]:ends[row.end]]
    else:  # rollouts from elsewhere: token ids stand for the text
        text = " ".join(map(str, rollout["responses"][i, row.start:row.end].tolist()))
    text = sampling.printable(text).replace("\n", "·") or "(end)"
    room = max(12, width - len(row.branch) - 2)
    if len(text) > room:
        text = f"{text[:room // 2]}…{text[-((room - 1) // 2):]}"
    return f"{row.branch + text:{width}}"

def shown_rollout(rollouts, number):
    """The rollout that --show asks for. UserError if there is none of that number."""
    if number >= len(rollouts["prompts"]):
        raise sampling.UserError(f"--show {number}: there are {len(rollouts['prompts'])} prompts")
    return rollouts["prompts"][number]

def print_prompt(rollout, columns):
    """The lines above a tree: the prompt, its reference, and the names of the columns."""
    print(sampling.printable(f"\n{rollout['prompt']}\n  reference  {rollout['reference']}\n"))
    print(f"{'':58}    {columns}")

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
    for rollout, score in zip(rollouts["prompts"], scores["prompts"]):
        lengths = rollout["lengths"]
        if not score["surprisal"].isfinite().all():
            raise sampling.UserError(f"a surprisal of {rollout['id']} is NaN or infinite")
        boundaries = select_boundaries(score["surprisal"], lengths, args.fork_budget)
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
        nats = scores["prompts"][args.show]["surprisal"][row.members[0], row.start:row.end][:1]
        print(span_text(shown, row), f"{len(row.members):4}", *(f"{x:10.2f}" for x in nats))
    print("\nn responses share a span. Its surprisal, in nats, is that of its first token.\n"
          f"Boundaries, in tokens: {boundaries}")

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
