"""04: which decision earned the reward?

The reward r of a response is its sentence BLEU against the reference, in [0, 1]. GRPO turns it into
one advantage, (r - mean) / deviation, for all tokens of the response. LEAF asks where in the tree
(03) it was earned.

The span of a node ends at its boundary, and begins at the cut before, or at 0. Each of its n
members has a copy of it; what each does at the boundary is in its next span. The value V of node
and span is the mean reward of the n. A tail has n = 1 and V = r; identical ones form no node. Is a
span better than the average, V(root), and better than the span that it continues?

    GA = V - V(root)       the global advantage; the root is all K responses
    LA = V - V(parent)     the local advantage; the parent is the span before, or the root
    credit = (GA + LA) / √n

The example of 03, with rewards:

root                             V 0.50
├─ You have          n 3         V 0.60   (0.10 + 0.10) / √3 = +0.12 each
│  ├─ at this moment n 2         V 0.80   (0.30 + 0.20) / √2 = +0.35 each
│  │  ├─ twenty messages. (y0)   r 1.0     0.50 + 0.20 = +0.70
│  │  └─ twelve messages. (y1)   r 0.6     0.10 - 0.20 = -0.10
│  └─ no messages ...     (y2)   r 0.2    -0.30 - 0.40 = -0.70
└─ There are ...          (y3)   r 0.2    -0.30 - 0.30 = -0.60

>>> for spans in span_advantages(boundaries=[2, 5], groups=[[[0, 1, 2]], [[0, 1]]],
...                              lengths=[8, 8, 8, 8], rewards=[1.0, 0.6, 0.2, 0.2]):
...     print(*(f"{start}..{end} {credit:+.2f}" for start, end, credit in spans))
0..2 +0.12 2..5 +0.35 5..8 +0.70
0..2 +0.12 2..5 +0.35 5..8 -0.10
0..2 +0.12 2..8 -0.70
0..8 -0.60

A span 2..5 has the tokens 2, 3 and 4. The tail of y1 earned more than the average, but less than
the span that it continues: GRPO makes it more probable, LEAF less. Where all members of a node go
on alike to the next boundary, nothing was decided: LA is 0, and GA alone counts. A first span has
the root for its parent, so LA = GA: y3, which is all tail, has 2 (r - V(root)), as in the paper.

Last, credits become advantages by a z-score: less their mean over the spans of all K responses,
divided by their deviation, so that each prompt pushes with about the same strength.

What is new? Not GA. In GRPO a shared span gets the r - mean of each response that has a copy of it:
in sum n GA, if they are equally long (the loss averages over a response). LA is new, and:

- √n. The mean V of n independent rewards of deviation σ deviates by σ/√n. The gradient has V
  n times, once per copy: its noise is √n σ, that of a tail is σ. With each copy divided by √n
  it is σ for both. Else most of the gradient's noise would come from spans that many share.
- The scale. LEAF divides by the deviation of the credits, however small: where rewards hardly
  differ, it enlarges what little differs, noise included. The paper's GRPO divides r - mean by
  max(deviation, 1/3), for BLEU within a prompt often 1/3: there small differences stay small.

Sizes   K responses, T tokens in the longest, n responses in a node
Reads   RUN/rollouts.pt: texts, reference, lengths; RUN/tree.pt
Writes  RUN/advantages.pt, per prompt: float32 rewards (K,); leaf, grpo, td and tempo (K, T), each
        token's advantage by each method, 0 at padding; and spans, K lists of [start, end, credit]
Run     python 04_advantage.py                                   demo: about 1 s
Differs from the paper (arXiv 2606.07610): two flags, td, tempo. (Steps 4 to 7 of the README.)
"""
import math
import re
import statistics
from collections import Counter
from importlib import import_module

import torch

sampling = import_module("01_sample")  # for its last part: files, flags and errors of all stages
tree = import_module("03_tree")

def main(args):
    # Read.
    rollouts = sampling.load_stage(args.run, "rollouts")
    trees = sampling.load_stage(args.run, "tree", rollouts)
    shown = tree.shown_rollout(rollouts, args.show)

    # Credit every span, and spread its advantage over its tokens.
    prompts = []
    counts = []
    for rollout, prompt_tree in zip(rollouts["prompts"], trees["prompts"]):
        rewards = checked_rewards(prompt_rewards(rollout), rollout)
        lengths = rollout["lengths"].tolist()
        groups = prompt_tree["groups"]
        spans = span_advantages(prompt_tree["boundaries"], groups, lengths, rewards,
                                args.advantage_terms, args.multiplicity)
        whole = [[(0, length, advantage)]  # for GRPO a response is one span
                 for length, advantage in zip(lengths, grpo_advantages(rewards))]
        grpo = spread(whole, lengths)
        td = td_advantages(rollout["responses"], rewards)
        prompts.append({"rewards": torch.tensor(rewards, dtype=torch.float32), "grpo": grpo,
                        "leaf": spread(zscore(spans), lengths), "td": td, "tempo": grpo + td,
                        "spans": [[list(span) for span in response] for response in spans]})
        counts.append([len(groups), *count_forks(groups, rewards)])

    # Write.
    meta = {**trees["meta"], "advantage_terms": args.advantage_terms,
            "multiplicity": args.multiplicity}
    sampling.save_stage(args.run, "advantages", meta, prompts)

    # Show totals, and one tree.
    mean = sum(prompt["rewards"].mean().item() for prompt in prompts) / len(prompts)
    num_boundaries, num_forks, differ = torch.tensor(counts).sum(dim=0).tolist()
    print(f"{len(prompts)} prompts, mean reward {mean:.3f} -> {args.run}/advantages.pt\n"
          f"{num_forks} of {num_boundaries} boundaries have a node, {differ} with unequal rewards")
    prompt = prompts[args.show]
    shown_tree = trees["prompts"][args.show]
    tree.print_prompt(shown, "n    value   credit     LEAF     GRPO")
    for row in tree.tree_rows(shown_tree["boundaries"], shown_tree["groups"], shown["lengths"]):
        columns = [mean_reward(prompt["rewards"], row.members)]
        if row.start < row.end:
            columns.append(sum(prompt["spans"][i][row.level][2] for i in row.members))
            for method in ("leaf", "grpo"):
                columns.append(prompt[method][row.members, row.start].sum())
        numbers = "".join(f"{column:9.3f}" for column in columns)
        print(f"{tree.span_text(shown, row)}{len(row.members):5}{numbers}")
    print("\nn responses share a span; value is their mean reward. The rest are sums over the n\n"
          "copies, as in the gradient: credit, LEAF's advantage (its z-score), GRPO's advantage.\n"
          "(end): one of several identical responses, which have ended.")

def span_advantages(boundaries, groups, lengths, rewards, terms="both", multiplicity=0.5):
    """Step 5: the spans of each response and their credits, K lists of (start, end, credit).
    boundaries: ascending token counts; groups[j]: the nodes at boundaries[j], lists of response
    numbers; lengths (K,); rewards (K,); terms: "both", or "global" or "local" alone; credits are
    divided by n ** multiplicity, so 0.5 is the √n, and 0 leaves it out.

    Responses that end at or before the boundary of their node are identical. Nothing is left for a
    tail: their last span is the node's, with √n. spread cuts off what lies beyond their end."""
    root_value = mean_reward(rewards, range(len(lengths)))
    spans = []
    for i, length in enumerate(lengths):
        path = []  # (end, members) of its spans, in order
        for boundary, nodes in zip(boundaries, groups):
            path += [(int(boundary), members) for members in nodes if i in members]  # 1 at most
        if not path or path[-1][0] < length:
            path.append((int(length), [i]))  # the tail
        response_spans = []
        start = 0
        parent_value = root_value
        for end, members in path:
            n = len(members)
            value = mean_reward(rewards, members)
            GA = value - root_value
            LA = value - parent_value
            credit = {"both": GA + LA, "global": GA, "local": LA}[terms]
            response_spans.append((start, end, credit / n ** multiplicity))
            start = end
            parent_value = value
        spans.append(response_spans)
    return spans

def mean_reward(rewards, members):
    """V, the value of a node: the mean reward of its members."""
    return sum(float(rewards[i]) for i in members) / len(members)

def zscore(spans):
    """Step 6: the credits of a prompt's spans, normalized: their advantages. Each copy of a span
    counts once, whatever its length, even without tokens. The mean of the credits need not be 0, so
    a credit near 0 may change its sign. The floor 1e-6 is for credits that are all equal."""
    credits = [credit for response_spans in spans for _, _, credit in response_spans]
    mean = statistics.fmean(credits)
    scale = max(sample_std(credits), 1e-6)
    return [[(start, end, (credit - mean) / scale) for start, end, credit in response_spans]
            for response_spans in spans]

def sample_std(values):
    """Standard deviation, its denominator the number of values minus 1; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0

def grpo_advantages(rewards):
    """Step 7, plain GRPO: rewards (K,) -> (K,) float32, one advantage for a whole response. The
    floor 1/3 is the paper's: where rewards hardly differ, advantages stay small."""
    rewards = [float(reward) for reward in rewards]
    mean = statistics.fmean(rewards)
    scale = max(sample_std(rewards), 1 / 3) + 1e-6  # as published
    return torch.tensor([(reward - mean) / scale for reward in rewards])

def td_advantages(responses, rewards):
    """For comparison, what TEMPO (arXiv 2509.18314) adds to GRPO: what each token changes in V,
    the mean reward of those that begin alike, over GRPO's scale. (K, T) -> (K, T) float32.

    >>> tokens_0_2_and_5 = torch.tensor([[1, 1, 1], [1, 1, 2], [1, 2, 1], [2, 1, 1]])
    >>> td_advantages(tokens_0_2_and_5, rewards=[1.0, 0.6, 0.2, 0.2])[1]  # y1
    tensor([ 0.2611,  0.5222, -0.5222])
    """
    earned = torch.tensor(rewards, dtype=torch.float64)[:, None]  # (K, 1)
    alike = (responses[:, None] == responses).cumprod(dim=2)  # (K, K, T): up to token t
    values = (alike * earned).sum(dim=1) / alike.sum(dim=1)  # (K, T): V after token t
    changes = values.diff(dim=1, prepend=earned.mean().expand(len(rewards), 1))
    return changes.float() / max(sample_std(rewards), 1 / 3)

def spread(spans, lengths):
    """The spans of K responses of `lengths` tokens -> (K, T) float32: each token gets the advantage
    of its span, undivided; 0 at padding."""
    tokens = torch.zeros(len(lengths), max(lengths))
    for i, response_spans in enumerate(spans):
        for start, end, advantage in response_spans:
            tokens[i, start:min(end, lengths[i])] = advantage
    return tokens

def count_forks(groups, rewards):
    """How many boundaries have a node (forks), and how many of these one whose rewards differ.

    >>> count_forks([[[0, 1], [2, 3]], [[0, 1]], []], rewards=[0.5, 0.5, 0.2, 0.3])
    (2, 1)
    """
    have_node = 0
    differ = 0
    for nodes in groups:
        have_node += len(nodes) > 0
        differ += any(len({rewards[i] for i in members}) > 1 for members in nodes)
    return have_node, differ

# -- Reward: BLEU, as sacrebleu has it. Skip it when you read for LEAF. --------------------------
def prompt_rewards(rollout):
    """Step 4: the rewards of a prompt's K responses, in [0, 1]. Edit here for another reward."""
    return [sentence_bleu(text, rollout["reference"]) for text in rollout["texts"]]

def checked_rewards(rewards, rollout):
    """Rewards as floats, for numbers of any kind. UserError if they are not K finite numbers."""
    K = len(rollout["lengths"])
    with sampling.as_user_error(f"the rewards of {rollout['id']} are not {K} finite numbers"):
        numbers = [float(reward) for reward in rewards]
        if len(numbers) != K or not all(map(math.isfinite, numbers)):
            raise ValueError(rewards)
    return numbers

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
        help="credits are divided by n ** multiplicity; 0 = not at all")
    add("--show", type=sampling.number(int, 0), default=0, help="prompt to show, from 0")
    return parser.parse_args()

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
