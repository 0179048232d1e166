"""Stage 3: where did the K responses part ways?

Where the model was most surprised, it decided. The positions of highest surprisal become fork
boundaries, one set per prompt; at each of them the responses with the same beginning form a node.
The nodes make K independent responses a tree. Nothing branched while sampling.

Reads   RUN/rollouts.pt, RUN/surprisal.pt
Writes  RUN/tree.pt, per prompt: boundaries (<= B,) int64, ascending token positions; nodes, the
        groups of two or more responses: boundary (M,) int64, members (M, K) bool
Run     python 03_tree.py                                        demo: about 1 s
        python 03_tree.py --fork-budget 4 --show 7               more forks, another prompt's tree
"""
import unicodedata
from importlib import import_module

sampling = import_module("01_sample")

import torch

def fork_distance(lengths, B):
    """D, the least distance of two boundaries: B of them, spread over the shortest response."""
    return max(2, int(min(lengths)) // (B + 1))

def select_boundaries(surprisal, lengths, B):
    """Step 2: up to B positions of highest surprisal, D or more apart, ascending (list of int).

    surprisal (K, T) nats, lengths (K,). A boundary b cuts between the tokens b-1 and b.

    >>> select_boundaries(torch.tensor([[0.1, 0.2, 3.0, 2.0, 0.1, 1.0]]), torch.tensor([6]), B=2)
    [2, 5]
    """
    candidates = [(-nats, i, b) for i, row in enumerate(surprisal.tolist())
                  for b, nats in enumerate(row[:int(lengths[i])]) if b >= 1]
    boundaries = []
    for _, _, b in sorted(candidates):  # highest surprisal first; ties: lower i, then lower b
        if len(boundaries) == B:
            break
        if all(abs(b - kept) >= fork_distance(lengths, B) for kept in boundaries):
            boundaries.append(b)
    return sorted(boundaries)

def group_prefixes(responses, lengths, boundary):
    """Step 3: the responses that share their first `boundary` tokens, groups of two or more.

    responses (K, T), lengths (K,) -> list of lists of int, in order of their first member. A
    response that ends before the boundary is grouped by all of its tokens.

    >>> group_prefixes(torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 0]]), torch.tensor([3, 3, 2]), 2)
    [[0, 1]]
    """
    groups = {}
    for i, (row, length) in enumerate(zip(responses.tolist(), lengths.tolist())):
        groups.setdefault(tuple(row[:min(boundary, length)]), []).append(i)
    return [members for members in groups.values() if len(members) > 1]

def unpack_tree(found):
    """One prompt of tree.pt -> boundaries (list of int), groups (the nodes at each of them)."""
    boundaries, nodes = found["boundaries"].tolist(), found["nodes"]
    levels = [nodes["members"][nodes["boundary"] == b] for b in boundaries]
    return boundaries, [[row.nonzero().squeeze(1).tolist() for row in level] for level in levels]

# The picture, in 04 with the credit of each span.

def tree_rows(boundaries, groups, lengths):
    """The tree in the order it is drawn: a list of (branch, members, k, start, end).

    branch is the line drawing in front; members share the tokens start..end, the k-th span of
    each. Several members are a node, a single one is an ending; a response that was sampled twice
    may end inside its node and then has an ending without tokens.
    """
    rows = []

    def grow(members, k, start, indent, levels):
        while members:
            nodes = levels[0][1] if levels else []
            group = next((node for node in nodes if members[0] in node), members[:1])
            members = [i for i in members if i not in group]
            length = int(lengths[group[0]])
            end = min(levels[0][0], length) if len(group) > 1 else length
            rows.append((indent + ("├─ " if members else "└─ "), group, k, start, end))
            if len(group) > 1:
                grow(group, k + 1, end, indent + ("│  " if members else "   "), levels[1:])

    grow(list(range(len(lengths))), 0, 0, "", list(zip(boundaries, groups)))
    return rows

def spelled(prompt, i, start, end, width):
    """Tokens start..end of response i as one line of text, its middle left out beyond `width`."""
    if "ends" in prompt:
        first, last = (int(prompt["ends"][i, t - 1]) if t else 0 for t in (start, end))
        text = prompt["texts"][i][first:last]
    else:  # rollouts made elsewhere: token ids stand for the text
        text = " ".join(map(str, prompt["responses"][i, start:end].tolist()))
    text = "".join(c if c.isprintable() else "·" for c in text) or "(end)"
    return text if len(text) <= width else f"{text[:width // 2]}…{text[-((width - 1) // 2):]}"

def draw_tree(prompt, found, heading, columns, width=58):
    """Print one prompt's tree; columns(members, k, start) is the text to the right of a span."""
    print(f"\n{prompt['prompt']}\n  wanted: {prompt['reference']}\n\n{'':{width}}{heading}")
    for branch, members, k, start, end in tree_rows(*unpack_tree(found), prompt["lengths"]):
        text = branch + spelled(prompt, members[0], start, end, max(12, width - len(branch) - 2))
        wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)  # they take two cells
        print(f"{text:{width - wide}}{columns(members, k, start)}".rstrip())

def prompt_number(show, rollouts):
    """--show, or BadInput if there is no such prompt."""
    last = len(rollouts["prompts"]) - 1
    if show > last:
        raise sampling.BadInput(f"--show is {show}, but the last prompt is number {last}")
    return show

def parse_args():
    parser = sampling.stage_parser(__doc__)
    parser.add_argument("--fork-budget", type=sampling.limited(int, 0), default=2,
                        help="B, most boundaries per prompt")
    parser.add_argument("--show", type=sampling.limited(int, 0), default=0,
                        help="number of the prompt to draw, from 0")
    return parser.parse_args()

def main(args):
    # 1. The responses and their surprisal.
    rollouts = sampling.load_stage(args.run, "rollouts")
    surprisal = sampling.load_stage(args.run, "surprisal", rollouts)
    B, show = args.fork_budget, prompt_number(args.show, rollouts)

    # 2. Boundaries and nodes of every prompt.
    prompts = []
    for rollout, scored in zip(rollouts["prompts"], surprisal["prompts"]):
        boundaries = select_boundaries(scored["surprisal"], rollout["lengths"], B)
        nodes = [(b, members) for b in boundaries
                 for members in group_prefixes(rollout["responses"], rollout["lengths"], b)]
        is_member = torch.zeros(len(nodes), len(rollout["lengths"]), dtype=torch.bool)
        for row, (_, members) in zip(is_member, nodes):
            row[members] = True
        at = torch.tensor([b for b, _ in nodes], dtype=torch.int64)
        prompts.append({"boundaries": torch.tensor(boundaries, dtype=torch.int64),
                        "nodes": {"boundary": at, "members": is_member}})

    # 3. Write.
    sampling.save_stage(args.run, "tree", {**rollouts["meta"], "fork_budget": B}, prompts)

    # 4. Show.
    count = sum(len(found["nodes"]["boundary"]) for found in prompts) / len(prompts)
    print(f"{len(prompts)} prompts, {count:.1f} nodes each -> {args.run}/tree.pt")
    prompt, nats = rollouts["prompts"][show], surprisal["prompts"][show]["surprisal"]
    rewards = import_module("04_advantage").prompt_rewards(prompt)  # looks ahead, for the picture

    def columns(members, k, start):
        i, many = members[0], len(members) > 1
        decided = f"{nats[i, start]:9.2f}" if start < prompt["lengths"][i] else ""
        return f"{decided:9}" + (f"{len(members):5} share it" if many else f"{rewards[i]:9.2f}")

    draw_tree(prompt, prompts[show], "surprisal   reward", columns)
    print(f"\nForks before the tokens {prompts[show]['boundaries'].tolist()}, "
          f"{fork_distance(prompt['lengths'], B)} or more apart. Surprisal, in nats, is that of a\n"
          "span's first token, the one that was decided there.")

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
