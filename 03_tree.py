"""03: where did the K responses part ways?

A model that is surprised by its own token had others to choose from: it decided there. Surprisal
is -log of the token's probability, in nats (02). LEAF cuts the responses before their most
surprising tokens. Responses that agree on every token up to a cut have decided alike so far. They
form a node, and the nodes form a tree. Nothing branched while sampling.

A cut is called a fork boundary. It is a number of tokens, b: it lies between the tokens b-1 and b.
It is found in one response and applied to all K, because a node compares responses by their first b
tokens, and that takes one b for all. Where responses do not part, a boundary splits no group: the
tree may be cut inside a word, and both sides of the cut hold the same responses.

Sizes   K responses, T tokens in the longest, B fork budget, J nodes of the tree
Reads   RUN/rollouts.pt (responses, lengths; for the picture texts, ends), RUN/surprisal.pt
Writes  RUN/tree.pt, per prompt: boundaries (<= B,) int64, ascending; nodes: boundary (J,) int64,
        members (J, K) bool, True for the responses in a node
Run     python 03_tree.py                                        demo: about 1 s
        python 03_tree.py --fork-budget 4 --show 7               more boundaries, another picture
Differs from the paper: nothing.
"""
from collections import namedtuple
from importlib import import_module

import torch

sampling = import_module("01_sample")

def fork_distance(lengths, B):
    """D, the least distance of two boundaries in tokens: B of them fit in the shortest response."""
    return max(2, int(min(lengths)) // (B + 1))

def select_boundaries(surprisal, lengths, B):
    """Step 2: up to B boundaries before the most surprising tokens, each D or more from the others.

    surprisal (K, T) nats, lengths (K,) -> list of int, ascending. Why b >= 1: in front of its first
    token, a response has nothing to share.

    >>> select_boundaries(torch.tensor([[0.1, 0.2, 3.0, 2.0, 0.1, 1.0]]), torch.tensor([6]), B=2)
    [2, 5]
    """
    candidates = []
    for i, row in enumerate(surprisal.tolist()):
        for b in range(1, int(lengths[i])):
            candidates.append((-row[b], i, b))
    D = fork_distance(lengths, B)
    boundaries = []
    for _, _, b in sorted(candidates):  # highest surprisal first; ties: lower i, then lower b
        if len(boundaries) == B:
            break
        if all(abs(b - kept) >= D for kept in boundaries):
            boundaries.append(b)
    return sorted(boundaries)

def group_prefixes(responses, lengths, boundary):
    """Step 3: the nodes at a boundary, each a group of two or more responses that share their first
    `boundary` tokens: a list of lists of int, in order of their first member.

    responses (K, T), lengths (K,). A response that is shorter is compared by all of its tokens. So
    the node of identical short responses may lie past their end.

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
    nodes = [(b, members) for b, level in zip(boundaries, groups) for members in level]
    is_member = torch.zeros(len(nodes), K, dtype=torch.bool)
    for j, (_, members) in enumerate(nodes):
        is_member[j, members] = True
    node_boundary = torch.tensor([b for b, _ in nodes], dtype=torch.int64)
    return {"boundaries": torch.tensor(boundaries, dtype=torch.int64),
            "nodes": {"boundary": node_boundary, "members": is_member}}

def unpack_tree(prompt_tree):
    """A prompt of tree.pt -> boundaries (list of int), groups (the nodes at each of them)."""
    boundaries = prompt_tree["boundaries"].tolist()
    nodes = prompt_tree["nodes"]
    groups = []
    for b in boundaries:
        level = nodes["members"][nodes["boundary"] == b]
        groups.append([row.nonzero().squeeze(1).tolist() for row in level])
    return boundaries, groups

# The picture of a tree, in 03 and 04.
Row = namedtuple("Row", "branch members level start end")

def tree_rows(boundaries, groups, lengths):
    """The lines of the picture, a list of Rows: the line drawing in front (str), and a span of the
    tree, the tokens start..end that its members share, the level-th span of each of them.

    Several members are a node, a single one is the tail of a response. Identical responses may end
    inside their node; their tails have no tokens.
    """
    rows = []

    def grow(parent, level, start, indent):
        nodes = groups[level] if level < len(groups) else []
        children = [members for members in nodes if members[0] in parent]
        in_node = {i for members in children for i in members}
        children += [[i] for i in parent if i not in in_node]
        children.sort()
        for members in children:
            is_last = members is children[-1]
            is_node = len(members) > 1
            length = int(lengths[members[0]])
            end = min(length, boundaries[level]) if is_node else length
            branch = indent + ("└─ " if is_last else "├─ ")
            rows.append(Row(branch, members, level, start, end))
            if is_node:
                grow(members, level + 1, end, indent + ("   " if is_last else "│  "))

    grow(list(range(len(lengths))), 0, 0, "")
    return rows

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
    """The rollout that --show asks for. Raises UserError if there is none of that number."""
    count = len(rollouts["prompts"])
    if number >= count:
        raise sampling.UserError(f"--show is {number}, but the last prompt is number {count - 1}")
    return rollouts["prompts"][number]

def parse_args():
    parser = sampling.stage_parser(__doc__)
    add = parser.add_argument
    add("--fork-budget", type=sampling.number(int, 0), default=2, help="B, boundaries per prompt")
    add("--show", type=sampling.number(int, 0), default=0, help="the prompt to draw, from 0")
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
        boundaries = select_boundaries(score["surprisal"], lengths, args.fork_budget)
        groups = [group_prefixes(rollout["responses"], lengths, b) for b in boundaries]
        trees.append(pack_tree(boundaries, groups, len(lengths)))

    # Write.
    meta = {**rollouts["meta"], "fork_budget": args.fork_budget}
    sampling.save_stage(args.run, "tree", meta, trees)

    # Show one tree.
    num_nodes = sum(len(prompt_tree["nodes"]["boundary"]) for prompt_tree in trees)
    print(f"{len(trees)} prompts, {num_nodes / len(trees):.1f} nodes each -> {args.run}/tree.pt\n")
    print(sampling.printable(f"{shown['prompt']}\n  reference  {shown['reference']}\n"))
    print(f"{'':58}    n  surprisal")
    boundaries, groups = unpack_tree(trees[args.show])
    surprisal = scores["prompts"][args.show]["surprisal"]
    for row in tree_rows(boundaries, groups, shown["lengths"]):
        first_token_nats = surprisal[row.members[0], row.start:row.end][:1].tolist()
        columns = f"{len(row.members):5}" + "".join(f"{nats:11.2f}" for nats in first_token_nats)
        print(span_text(shown, row) + columns)
    D = fork_distance(shown["lengths"], args.fork_budget)
    print(f"\nn responses share a span. Its surprisal, in nats, is that of its first token.\n"
          f"Boundaries: {boundaries}, {D} or more tokens apart.")

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
