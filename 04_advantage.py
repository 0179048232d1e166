"""Stage 4: which decision earned the reward?

GRPO gives a response's reward to all of its tokens. LEAF gives each span of the tree what its
descendants earned: a node is worth the mean reward of the responses through it, and a span is
credited for being better than the average (global term) and than the branch it grew from (local).

Reads   RUN/rollouts.pt, RUN/tree.pt
Writes  RUN/advantages.pt, per prompt: rewards (K,) in [0, 1]; node_value (M,), the mean reward of
        each node; leaf and grpo (K, T) float32, 0 at padding; spans, K lists of
        [start, end, advantage before the z-score]
Run     python 04_advantage.py                                   demo: about 1 s
        python 04_advantage.py --advantage-terms local           an ablation (global, local)
"""
import math
import re
import statistics
from collections import Counter
from importlib import import_module

sampling = import_module("01_sample")
forks = import_module("03_tree")

import torch

# Reward: sentence BLEU (step 8).

def tokenize_13a(text):
    """The tokens BLEU counts: mteval-13a's, which part punctuation from words but not from digits.

    >>> tokenize_13a("It's 3.5 km, he said.")
    ["It's", '3.5', 'km', ',', 'he', 'said', '.']
    """
    text = " ".join(text.replace("<skipped>", "").split())
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")  # ASCII symbols, not ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # a full stop or comma, unless digits
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)  # stand on both sides
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)  # a dash after a digit
    return text.split()

def bleu_counts(hypothesis, reference, lowercase=False):
    """Ten ints: matched and total n-grams of 1 to 4 tokens (4 each), and both lengths in tokens."""
    if lowercase:
        hypothesis, reference = hypothesis.lower(), reference.lower()
    hyp, ref = tokenize_13a(hypothesis), tokenize_13a(reference)
    matched, total = [], []
    for n in range(1, 5):
        ngrams, wanted = (Counter(zip(*(words[k:] for k in range(n)))) for words in (hyp, ref))
        matched.append((ngrams & wanted).total())  # as often as the reference has them
        total.append(ngrams.total())
    return [*matched, *total, len(hyp), len(ref)]

def bleu_score(counts, effective_order):
    """BLEU in [0, 1] from counts: geometric mean of the n-gram precisions times brevity penalty.

    Exponential smoothing: the first order without a match counts as 1/2 match, the next 1/4.
    effective_order leaves out the orders for which the hypothesis is too short (sentences).
    """
    matched, total, (hyp_length, ref_length) = counts[:4], counts[4:8], counts[8:]
    orders = sum(count > 0 for count in total) if effective_order else 4
    if not any(matched) or min(total[:orders]) == 0:
        return 0.0
    smooth, log_sum = 1.0, 0.0
    for hits, count in zip(matched[:orders], total):
        if hits == 0:
            smooth /= 2
        log_sum += math.log((hits or smooth) / count)
    brevity = min(0.0, 1 - ref_length / hyp_length)
    return min(1.0, math.exp(brevity + log_sum / orders))

def sentence_bleu(hypothesis, reference, lowercase=False):
    """Sentence BLEU of a hypothesis (str) against one reference (str), in [0, 1].

    Equal to sacrebleu's sentence_bleu / 100, white space collapsed first.

    >>> round(sentence_bleu("you have five new messages", "you have four new messages"), 3)
    0.302
    """
    return bleu_score(bleu_counts(hypothesis, reference, lowercase), effective_order=True)

def prompt_rewards(prompt):
    """The K rewards of a prompt's responses, floats in [0, 1]. Fork here for another reward."""
    return [sentence_bleu(text, prompt["reference"]) for text in prompt["texts"]]

# Credit (steps 4 to 6).

def mean_reward(rewards, members):
    """V (step 3): the mean reward of the responses in `members`."""
    return sum(float(rewards[i]) for i in members) / len(members)

def span_advantages(boundaries, groups, lengths, rewards, terms="both"):
    """Step 4: the spans of each response and what each earned.

    boundaries: ascending token positions; groups[j]: the nodes at boundaries[j], lists of response
    numbers; lengths (K,); rewards (K,) in [0, 1]; terms: "both", "global" or "local".
    Returns K lists of (start, end, advantage before the z-score).

    >>> span_advantages([2], [[[0, 1]]], [4, 3, 5], [1.0, 0.4, 0.1], "global")[0]  # V 0.7, root 0.5
    [(0, 2, 0.14142135623730948), (2, 4, 0.5)]
    """
    use_global, use_local = {"both": (1, 1), "global": (1, 0), "local": (0, 1)}[terms]
    K = len(lengths)
    root = mean_reward(rewards, range(K))
    spans = []
    for i in range(K):
        path = [(int(b), members) for b, level in zip(boundaries, groups)
                for members in level if i in members]
        # subtle: the node of twin responses may lie past their end; the span still counts
        if not path or path[-1][0] < lengths[i]:
            path.append((int(lengths[i]), [i]))  # the tail, a node of its own
        start, parent, row = 0, root, []
        for end, members in path:
            value = mean_reward(rewards, members)
            credit = use_global * (value - root) + use_local * (value - parent)
            # n responses hold this span and would each be credited: the multiplicity correction.
            row.append((start, end, credit / math.sqrt(len(members))))
            start, parent = end, value
        spans.append(row)
    return spans

def spread(values):
    """Sample standard deviation (n - 1); 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0

def zscore(spans):
    """Step 5: one prompt's span advantages standardised; a span counts once, long or short."""
    values = [advantage for row in spans for _, _, advantage in row]
    mean, scale = statistics.fmean(values), max(spread(values), 1e-6)
    return [[(start, end, (advantage - mean) / scale) for start, end, advantage in row]
            for row in spans]

def grpo_advantages(rewards):
    """Step 6, the baseline: rewards (K,) -> (K,) float32, one advantage for a whole response."""
    rewards = [float(reward) for reward in rewards]
    mean, scale = statistics.fmean(rewards), max(spread(rewards), 1 / 3) + 1e-6
    return torch.tensor([(reward - mean) / scale for reward in rewards])

def parse_args():
    parser = sampling.stage_parser(__doc__)
    parser.add_argument("--advantage-terms", default="both", choices=["both", "global", "local"],
                        help="against the average (global), the own branch (local), or both")
    parser.add_argument("--show", type=sampling.limited(int, 0), default=0,
                        help="number of the prompt to draw, from 0")
    return parser.parse_args()

def main(args):
    # 1. The responses and their tree.
    rollouts = sampling.load_stage(args.run, "rollouts")
    tree = sampling.load_stage(args.run, "tree", rollouts)
    show = forks.prompt_number(args.show, rollouts)

    # 2. Rewards, and the credit of every token.
    prompts = []
    for rollout, found in zip(rollouts["prompts"], tree["prompts"]):
        rewards, lengths = prompt_rewards(rollout), rollout["lengths"].tolist()
        boundaries, groups = forks.unpack_tree(found)
        spans = span_advantages(boundaries, groups, lengths, rewards, args.advantage_terms)
        leaf = torch.zeros(rollout["responses"].shape)
        grpo = torch.zeros_like(leaf)
        for i, (row, whole) in enumerate(zip(zscore(spans), grpo_advantages(rewards))):
            for start, end, advantage in row:
                leaf[i, start:min(end, lengths[i])] = advantage
            grpo[i, :lengths[i]] = whole
        values = [mean_reward(rewards, members) for level in groups for members in level]
        prompts.append({"rewards": torch.tensor(rewards).float(),
                        "node_value": torch.tensor(values), "leaf": leaf, "grpo": grpo,
                        "spans": [[list(span) for span in row] for row in spans]})

    # 3. Write.
    meta = {**tree["meta"], "advantage_terms": args.advantage_terms}
    sampling.save_stage(args.run, "advantages", meta, prompts)

    # 4. Show.
    mean = sum(earned["rewards"].mean().item() for earned in prompts) / len(prompts)
    alike = sum(len(set(earned["rewards"].tolist())) == 1 for earned in prompts)
    print(f"{len(prompts)} prompts, mean reward {mean:.3f} -> {args.run}/advantages.pt\n{alike} of "
          "them have responses that all scored alike: they carry no advantage in this round")
    spans, rewards = prompts[show]["spans"], prompts[show]["rewards"].tolist()
    standard, whole = zscore(spans), grpo_advantages(rewards).tolist()

    def columns(members, k, start):
        text = f"{len(members):3}{mean_reward(rewards, members):9.3f}"
        if k < len(spans[members[0]]):  # twins that end inside their node have no tail
            raw, leaf = (sum(rows[i][k][2] for i in members) for rows in (spans, standard))
            text += f"{raw:9.3f}{leaf:9.3f}{sum(whole[i] for i in members):9.3f}"
        return text

    forks.draw_tree(rollouts["prompts"][show], tree["prompts"][show],
                    "  n    value      raw     LEAF     GRPO", columns)
    print("""
n responses share the span; value is their mean reward. raw, LEAF and GRPO are sums over these n,
which is what the gradient of the shared tokens carries: LEAF's advantages before and after the
z-score, and GRPO's, from the same rewards. (end): answers that are the same to their last token
have nothing left to credit.""")

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
