"""04: which decision earned the reward?

The reward r of a response is its sentence BLEU against the reference, in [0, 1]. GRPO turns it into
one advantage, (r - mean) / deviation, for all tokens of the response. LEAF asks where in the tree
(03) the reward was earned.

Each node ends a span: the tokens that its n responses share after the cut before, or from the
start. The value V of node and span is the mean reward of these n. The tokens after the last cut of
a response, shared or not, are a span too: its tail, with n = 1 and V = r. Is a span better than the
average, and better than the branch that it continues?

    GA = V - V(root)       the global advantage; the root is all K responses
    LA = V - V(parent)     the local advantage; the parent is the span before it, or the root
    credit = (GA + LA) / √n

A first span has the root for its parent, so its GA and LA are the same. Where all of a node go on
alike to the next boundary, nothing was decided: there LA is 0, and GA alone counts. GRPO has GA
already: in the gradient, the advantages of n responses of one length add up to n GA, times a
constant, on a span that they share. LA and √n are LEAF's.

Why divide by √n? A shared span occurs n times in the gradient. Roughly, if rewards are
independent, with standard deviation σ, then their mean V has σ/√n, and the sum of n copies
has √n σ. With each copy divided by √n it has σ: a shared span is as noisy as a tail.

Last, a z-score over the spans of a prompt turns credits into advantages (step 5). Before it, in a
tree with cuts at 2 and 5, a response has these credits (this script prints sums over the n):

root                  V 0.50
├─ A   n 3            V 0.60   (0.10 + 0.10) / √3 = +0.12 each
│  ├─ B   n 2         V 0.80   (0.30 + 0.20) / √2 = +0.35 each
│  │  ├─ y0           r 1.0     0.50 + 0.20 = +0.70
│  │  └─ y1           r 0.6     0.10 - 0.20 = -0.10   above average, below its own branch
│  └─ y2              r 0.2    -0.30 - 0.40 = -0.70
└─ y3                 r 0.2    -0.30 - 0.30 = -0.60

>>> for spans in span_advantages(boundaries=[2, 5], groups=[[[0, 1, 2]], [[0, 1]]],
...                              lengths=[8, 8, 8, 8], rewards=[1.0, 0.6, 0.2, 0.2]):
...     print(*(f"{start}..{end} {credit:+.2f}" for start, end, credit in spans))
0..2 +0.12 2..5 +0.35 5..8 +0.70
0..2 +0.12 2..5 +0.35 5..8 -0.10
0..2 +0.12 2..8 -0.70
0..8 -0.60

A span 2..5 has the tokens 2, 3 and 4.

Sizes   K responses, T tokens in the longest, J nodes of the tree, n responses in a node
Reads   RUN/rollouts.pt: texts, reference, lengths; RUN/tree.pt
Writes  RUN/advantages.pt, per prompt: rewards (K,) in [0, 1]; node_value (J,), in the order of the
        nodes in tree.pt; leaf, by LEAF, and grpo, by GRPO, (K, T), 0 at padding: the advantage of
        each token, for 05; all float32; spans, K lists of [start, end, credit]
Run     python 04_advantage.py                                   demo: about 1 s
Differs from the paper (arXiv 2606.07610): nothing, unless the two flags for ablations are used.
Steps 3 (values) to 6 and 8 in the README's list.
"""
import math
import re
import statistics
from collections import Counter
from importlib import import_module

import torch

sampling = import_module("01_sample")  # its last part, shared by all: files, flags, errors
tree = import_module("03_tree")

# Credit.
def mean_reward(rewards, members):
    """V, the value of a node (step 3): the mean reward of its members."""
    return sum(float(rewards[i]) for i in members) / len(members)

def span_advantages(boundaries, groups, lengths, rewards, terms="both", multiplicity=0.5):
    """Step 4: the spans of each response and their credits, K lists of (start, end, credit).
    boundaries: ascending token counts; groups[j]: the nodes at boundaries[j], lists of response
    numbers; lengths (K,); rewards (K,) in [0, 1]; terms: "both", or "global" or "local" alone;
    multiplicity: the exponent of n. 0.5 is the √n, 0 leaves it out."""
    K = len(lengths)
    root_value = mean_reward(rewards, range(K))
    spans = []
    for i in range(K):
        path = []  # (end, members) of its spans: the nodes that it is in, from the root down
        for boundary, nodes in zip(boundaries, groups):
            path += [(int(boundary), members) for members in nodes if i in members]  # one or none
        # subtle: identical responses may end at or before the boundary of their node. Then they
        # have no tail, and their last spans may reach past their end, or lie past it: spans without
        # tokens, which the z-score counts all the same.
        if not path or path[-1][0] < lengths[i]:
            path.append((int(lengths[i]), [i]))  # the tail is like a node of one
        response_spans = []
        start = 0
        parent_value = root_value
        for end, members in path:
            n = len(members)
            value = mean_reward(rewards, members)
            GA = value - root_value
            LA = value - parent_value
            credit = {"both": GA + LA, "global": GA, "local": LA}[terms] / n ** multiplicity
            response_spans.append((start, end, credit))
            start = end
            parent_value = value
        spans.append(response_spans)
    return spans

def sample_std(values):
    """Standard deviation, its denominator the number of values minus 1; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0

def zscore(spans):
    """Step 5: the credits of a prompt's spans, normalized: their advantages. Each span of each
    response counts once, whatever its length, so a span shared by n counts n times. The mean of the
    credits need not be 0, so a credit near 0 may change its sign. The floor 1e-6 is for credits
    that are all equal."""
    credits = [credit for response_spans in spans for _, _, credit in response_spans]
    mean = statistics.fmean(credits)
    scale = max(sample_std(credits), 1e-6)
    return [[(start, end, (credit - mean) / scale) for start, end, credit in response_spans]
            for response_spans in spans]

def grpo_advantages(rewards):
    """Step 6, plain GRPO: rewards (K,) -> (K,) float32, one advantage for a whole response. The
    floor 1/3 is the paper's: where rewards hardly differ, advantages stay small. That of step 5
    only avoids 0 / 0: however little the credits of a prompt differ, their deviation becomes 1."""
    rewards = [float(reward) for reward in rewards]
    mean = statistics.fmean(rewards)
    scale = max(sample_std(rewards), 1 / 3) + 1e-6  # as published; the 1e-6 has no effect
    return torch.tensor([(reward - mean) / scale for reward in rewards])

def spread(spans, lengths):
    """The spans of K responses of `lengths` tokens -> (K, T) float32: each token has the advantage
    of its span, 0 at padding."""
    tokens = torch.zeros(len(lengths), max(lengths))
    for i, response_spans in enumerate(spans):
        for start, end, advantage in response_spans:
            tokens[i, start:min(end, lengths[i])] = advantage
    return tokens

def count_forks(groups, rewards):
    """How many boundaries have a node (fork), and how many one whose members differ in reward.

    >>> count_forks([[[0, 1], [2, 3]], [[0, 1]], []], rewards=[0.5, 0.5, 0.2, 0.3])
    (2, 1)
    """
    fork = 0
    usable = 0
    for nodes in groups:
        fork += len(nodes) > 0
        usable += any(len({rewards[i] for i in members}) > 1 for members in nodes)
    return fork, usable

# Reward: BLEU as everywhere. Skip it when you read for LEAF.
def prompt_rewards(rollout):
    """Step 8: the rewards of a prompt's K responses, in [0, 1]. Edit here for another reward."""
    return [sentence_bleu(text, rollout["reference"]) for text in rollout["texts"]]

def sentence_bleu(hypothesis, reference, lowercase=False):
    """Sentence BLEU of a hypothesis (str) against one reference (str), in [0, 1]: sacrebleu's
    sentence_bleu / 100, white space collapsed first."""
    return bleu([(hypothesis, reference)], lowercase, effective_order=True)

def bleu(pairs, lowercase, effective_order):
    """BLEU, in [0, 1], of pairs (hypothesis, reference): geometric mean of the n-gram precisions
    (1 to 4 tokens, counted over all pairs) times brevity penalty. Exponential smoothing: the first
    order without a match counts as 1/2 match, the next as 1/4. effective_order leaves out orders
    for which the hypothesis is too short (sentences)."""
    matched = [0, 0, 0, 0]
    total = [0, 0, 0, 0]
    hypothesis_length = 0
    reference_length = 0
    for hypothesis, reference in pairs:
        hypothesis_tokens = tokenize_13a(hypothesis.lower() if lowercase else hypothesis)
        reference_tokens = tokenize_13a(reference.lower() if lowercase else reference)
        hypothesis_length += len(hypothesis_tokens)
        reference_length += len(reference_tokens)
        for order in range(4):
            found = ngrams(hypothesis_tokens, order + 1)
            common = found & ngrams(reference_tokens, order + 1)  # the lower count of each
            matched[order] += common.total()
            total[order] += found.total()
    orders = sum(count > 0 for count in total) if effective_order else 4
    if not any(matched) or min(total[:orders]) == 0:
        return 0.0
    smooth = 1.0
    log_sum = 0.0
    for hits, count in zip(matched[:orders], total):
        if hits == 0:
            smooth /= 2
        log_sum += math.log((hits or smooth) / count)
    log_brevity = min(0.0, 1 - reference_length / hypothesis_length)
    return min(1.0, math.exp(log_brevity + log_sum / orders))

def ngrams(tokens, n):
    """A Counter of the n-grams in a list of tokens."""
    return Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))

def tokenize_13a(text):
    """The tokens that BLEU counts, mteval-13a's: "3.5 km, he said" is 3.5 | km | , | he | said."""
    text = " ".join(text.replace("<skipped>", "").split())
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")  # ASCII symbols, not ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # a stop or comma after a non-digit
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)  # a stop or comma before a non-digit
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)  # a dash after a digit
    return text.split()

def parse_args():
    parser = sampling.stage_parser(__doc__)
    add = parser.add_argument
    add("--advantage-terms", default="both", choices=["both", "global", "local"],
        help="GA + LA, or one of them alone, an ablation")
    add("--multiplicity", type=sampling.number(float, 0), default=0.5,
        help="exponent of n, 0 = no correction for shared spans")
    add("--show", type=sampling.number(int, 0), default=0, help="prompt to draw, from 0")
    return parser.parse_args()

def main(args):
    # Read.
    rollouts = sampling.load_stage(args.run, "rollouts")
    trees = sampling.load_stage(args.run, "tree", rollouts)
    shown = tree.shown_rollout(rollouts, args.show)

    # Credit every span, and spread its advantage over its tokens.
    prompts = []
    counts = []
    for rollout, prompt_tree in zip(rollouts["prompts"], trees["prompts"]):
        rewards = prompt_rewards(rollout)
        lengths = rollout["lengths"].tolist()
        boundaries, groups = tree.unpack_tree(prompt_tree)
        spans = span_advantages(boundaries, groups, lengths, rewards, args.advantage_terms,
                                args.multiplicity)
        leaf = spread(zscore(spans), lengths)
        whole = [[(0, length, advantage)]  # a response is one span
                 for length, advantage in zip(lengths, grpo_advantages(rewards))]
        grpo = spread(whole, lengths)
        counts.append([len(boundaries), *count_forks(groups, rewards)])
        values = [mean_reward(rewards, members) for nodes in groups for members in nodes]
        prompts.append({"rewards": torch.tensor(rewards, dtype=torch.float32),
                        "node_value": torch.tensor(values), "leaf": leaf, "grpo": grpo,
                        "spans": [[list(span) for span in response] for response in spans]})

    # Write.
    meta = {**trees["meta"], "advantage_terms": args.advantage_terms,
            "multiplicity": args.multiplicity}
    sampling.save_stage(args.run, "advantages", meta, prompts)

    # Show one tree.
    mean = sum(prompt["rewards"].mean().item() for prompt in prompts) / len(prompts)
    alike = sum(len(prompt["rewards"].unique()) == 1 for prompt in prompts)
    num_boundaries, num_forks, num_usable = torch.tensor(counts).sum(dim=0).tolist()
    print(f"{len(prompts)} prompts, mean reward {mean:.3f} -> {args.run}/advantages.pt\n"
          f"{alike} of them have all rewards equal, and so nothing to learn from\n"
          f"{num_forks} of {num_boundaries} boundaries have a node, responses with the same tokens "
          f"before;\nin {num_usable} of them, rewards differ inside a node")
    prompt = prompts[args.show]
    tree.print_prompt(shown, "n    value   credit     LEAF     GRPO")
    for row in tree.tree_rows(*tree.unpack_tree(trees["prompts"][args.show]), shown["lengths"]):
        columns = [mean_reward(prompt["rewards"], row.members)]
        if row.start < row.end:
            credits = [prompt["spans"][i][row.level][2] for i in row.members]
            columns.append(sum(credits))
            columns.append(prompt["leaf"][row.members, row.start].sum())
            columns.append(prompt["grpo"][row.members, row.start].sum())
        numbers = "".join(f"{column:9.3f}" for column in columns)
        print(f"{tree.span_text(shown, row)}{len(row.members):5}{numbers}")
    print("\nn responses share a span; value is their mean reward. The rest are sums over the n,\n"
          "as in the gradient of the shared tokens: credit, LEAF's advantage (its z-score), and\n"
          "GRPO's advantage. (end): identical responses, with no tokens left.")

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
