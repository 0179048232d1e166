"""How good is the gradient? Each method's beside the true one, from the same responses.

A training run is one noisy number; the gradient of one batch can be measured hundreds of times. For
each of N prompts, S responses are sampled. One half gives the gradient that all methods estimate,
the true one: the mean of (r - mean) grad log p(response), with respect to the LoRA. The other half
forms groups of K. From each group each method takes the gradient that 05 would take at the policy
that sampled, without the KL, before clipping and AdamW. A cosine says how well two gradients agree:

prompt_cosine   of a group, with the true gradient of its prompt
update_cosine   of an update, one group of each of 4 prompts, with the true gradient of all N
round_cosine    of a round, one group of each of the N prompts, with the same
mean_cosine     of the mean of all groups, with the same: short of 1 by the bias, and by the noise
                in both halves

`_se` is a standard error over groups, for the mean_cosine by jackknife. The methods share their
groups, so a difference is known better than two cosines: `_gap` is a method's cosine minus GRPO's,
`_gap_se` its standard error. All hold for these prompts and this true gradient. A group with all
rewards equal counts as 0.

As in training, responses come from a top-p nucleus, log-probabilities from the full softmax. Only
with --top-p 1 are the two the same policy, and the true gradient is that of its expected reward.
`grpo-std` is GRPO without a floor under the deviation. `td` credits a token by what it changes in V,
`tempo` adds that to GRPO's advantage. `leaf-all` is LEAF with a boundary wherever responses part.
`sum` is (r - mean) with a sum over tokens, as in the true gradient; the others take a mean.

Reads   RUN/adapter or, before the first training, RUN/rollouts.pt, which know the model; a manifest
Run     python tests/gradients.py --num-prompts 8 --num-samples 128           demo, 2 cores: 40 s
"""
import argparse
import statistics
import sys
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sampling = import_module("01_sample")
scoring = import_module("02_surprisal")
tree = import_module("03_tree")
advantage = import_module("04_advantage")
training = import_module("05_train")

SPAN_METHODS = {"leaf": {}, "leaf-all": {}, "global": {"terms": "global"},
                "local": {"terms": "local"}, "multiplicity 0": {"multiplicity": 0}, "no z-score": {}}
METHODS = ["grpo", "grpo-std", "td", "tempo", *SPAN_METHODS, "sum"]
COSINES = ["prompt_cosine", "update_cosine", "round_cosine", "mean_cosine"]
PROMPTS_PER_UPDATE = 4
SAMPLING = {"max_new_tokens": 200, "temperature": 1.0}  # as 01


def exact_match(rollout):
    """The rewards of a prompt's K responses: 1 where all words are the reference's, else 0."""
    return [float(text.split() == rollout["reference"].split()) for text in rollout["texts"]]


REWARDS = {"bleu": advantage.prompt_rewards, "exact": exact_match}


def sample_rollouts(model, tokenizer, examples, embeds, K, args):
    """K sampled responses to each example: dicts with the keys of rollouts.pt, but `ends`."""
    sampled = sampling.sample_all(model, embeds, args.prompts_per_batch, K, args.max_new_tokens,
                                  args.temperature, args.top_p)
    rollouts = []
    for example, prompt_embeds, (responses, lengths) in zip(examples, embeds, sampled):
        texts = sampling.decode_responses(tokenizer, responses, lengths)
        # subtle: clone, or what was made in inference mode could not take part in training
        rollouts.append({**example, "embeds": prompt_embeds.clone(), "texts": texts,
                         "responses": responses.clone(), "lengths": lengths.clone()})
    return rollouts


def token_advantages(method, rollout, fork_budget):
    """(K, T) of a rollout with the keys of rollouts.pt, surprisal.pt, and K floats, rewards."""
    rewards = rollout["rewards"]
    lengths = rollout["lengths"]
    if method in SPAN_METHODS:
        boundaries = tree.select_boundaries(rollout["surprisal"], lengths, fork_budget)
        if method == "leaf-all":
            boundaries = every_boundary(rollout["responses"])
        groups = [tree.group_prefixes(rollout["responses"], lengths, b) for b in boundaries]
        options = SPAN_METHODS[method]
        spans = advantage.span_advantages(boundaries, groups, lengths, rewards, **options)
        normalized = spans if method == "no z-score" else advantage.zscore(spans)
        return advantage.spread(normalized, lengths)
    changes = advantage.td_advantages(rollout["responses"], rewards)
    if method == "td":
        return changes
    values = advantage.grpo_advantages(rewards)
    if method in ("sum", "grpo-std"):
        values = torch.tensor(rewards) - statistics.fmean(rewards)
    if method == "grpo-std":
        values = values / (advantage.sample_std(rewards) + 1e-4)
    whole = [[(0, length, value)] for length, value in zip(lengths, values)]
    whole = advantage.spread(whole, lengths)
    return whole + changes if method == "tempo" else whole


def every_boundary(responses):
    """Wherever responses part that begin alike: B without limit, D 1."""
    alike = (responses[:, None] == responses).cumprod(dim=2)  # (K, K, T): up to token t
    part = alike[:, :, :-1] > alike[:, :, 1:]
    return (part.flatten(0, 1).any(dim=0).nonzero().flatten() + 1).tolist()


def flat_gradient(scalar, weights):
    """The gradient of a scalar with respect to the weights, as one vector on the CPU. The graph of
    the scalar is kept."""
    gradients = torch.autograd.grad(scalar, weights, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).cpu()


def true_gradient(model, groups, weights):
    """The policy gradient of a prompt from many responses, given in groups."""
    mean = statistics.fmean(reward for rollout in groups for reward in rollout["rewards"])
    total = 0
    for rollout in groups:
        logp = scoring.score_responses(model, [rollout])[0]  # (K, T), 0 at padding
        centered = torch.tensor(rollout["rewards"]) - mean
        total += flat_gradient((centered * logp.sum(dim=1)).mean(), weights)
    return total / len(groups)


def method_gradients(model, rollout, weights, fork_budget):
    """The gradient of each of METHODS from a group, (methods, weights): that of minus 05's loss."""
    logp = scoring.score_responses(model, [rollout])[0]
    old = logp.detach()
    mask = scoring.response_mask(rollout)
    gradients = []
    for method in METHODS:
        advantages = token_advantages(method, {**rollout, "surprisal": -old}, fork_budget)
        if method == "sum":
            objective = (logp * advantages).sum(dim=1).mean()
        else:
            objective = -training.policy_loss(logp, old, old, advantages, mask, 0.2, kl_weight=0)
        gradients.append(flat_gradient(objective, weights))
    return torch.stack(gradients)


def measure(model, prompts, weights, fork_budget):
    """The table's columns, tensors (methods,). prompts: lists of an even number of rollouts."""
    half = len(prompts[0]) // 2
    true = torch.stack([true_gradient(model, groups[:half], weights)
                        for groups in tqdm(prompts, desc="true gradient", unit="prompt")])
    all_true = true.mean(dim=0)
    prompt_cosines = []
    update_cosines = []
    rounds = torch.zeros(half, len(METHODS), len(all_true))  # round g: group g of every prompt
    updates = torch.zeros_like(rounds)
    for n, groups in enumerate(tqdm(prompts, desc="methods", unit="prompt")):
        gradients = torch.stack([method_gradients(model, rollout, weights, fork_budget)
                                 for rollout in groups[half:]])  # (groups, methods, weights)
        prompt_cosines.append(torch.cosine_similarity(gradients, true[n], dim=-1))
        rounds += gradients
        updates += gradients
        if (n + 1) % PROMPTS_PER_UPDATE == 0:
            update_cosines.append(torch.cosine_similarity(updates, all_true, dim=-1))
            updates.zero_()
    columns = {}
    for name, cosines in zip(COSINES, (torch.cat(prompt_cosines), torch.cat(update_cosines),
                                       torch.cosine_similarity(rounds, all_true, dim=-1))):
        gaps = cosines - cosines[:, :1]  # (groups, methods); GRPO is the first
        columns[name] = cosines.mean(dim=0)
        columns[f"{name}_se"] = cosines.std(dim=0) / len(cosines) ** 0.5
        columns[f"{name}_gap_se"] = gaps.std(dim=0) / len(gaps) ** 0.5
    total = rounds.sum(dim=0)
    without_one = torch.cosine_similarity(total - rounds, all_true, dim=-1)  # (groups, methods)
    gaps = without_one - without_one[:, :1]
    columns["mean_cosine"] = torch.cosine_similarity(total, all_true, dim=-1)
    columns["mean_cosine_se"] = without_one.std(dim=0, correction=0) * (half - 1) ** 0.5
    columns["mean_cosine_gap_se"] = gaps.std(dim=0, correction=0) * (half - 1) ** 0.5
    for name in COSINES:
        columns[f"{name}_gap"] = columns[name] - columns[name][0]
    return columns


def parse_args():
    parser = sampling.stage_parser(__doc__, prompts_per_batch=16)
    add = parser.add_argument
    add("--manifest", default="tests/demo/train.jsonl", help="JSON lines: audio, prompt, reference")
    add("--num-prompts", type=sampling.number(int, 1), default=32, help="N, a multiple of 4")
    add("--num-samples", type=sampling.number(int, 1), default=256, help="S, responses per prompt")
    add("--num-responses", type=sampling.number(int, 2), default=8, help="K, responses in a group")
    add("--fork-budget", type=sampling.number(int, 0), default=2, help="B, boundaries per prompt")
    add("--top-p", type=sampling.number(float, 0.001, 1), default=0.9, help="of the sampling")
    add("--reward", default="bleu", choices=list(REWARDS), help="sentence BLEU, or exact match")
    add("--seed", type=sampling.number(int, 0), default=0, help="of prompts, sampling and LoRA")
    add("--out", help="a CSV file for the table")
    return parser.parse_args()


def main(args):
    # Load the model, with the run's adapter or a new LoRA.
    K = args.num_responses
    if args.num_samples % (2 * K) or args.num_samples < 4 * K:  # a half of one group has no error
        raise sampling.UserError("--num-samples has to be a multiple of 2 K, and at least 4 K")
    if args.num_prompts % PROMPTS_PER_UPDATE:
        raise sampling.UserError("--num-prompts has to be a multiple of 4")
    state = sampling.read_state(args.run)
    trained = state if state["adapter"] else sampling.load_stage(args.run, "rollouts")["meta"]
    settings = {name: trained[name] for name in ("model", "system_prompt", "raw_prompt")}  # as 06
    args = argparse.Namespace(**vars(args), **settings, **SAMPLING, skip_unreadable=False)
    model, processor = sampling.load_model(args.model, state["adapter"], args.device)
    torch.manual_seed(args.seed)
    if not state["adapter"]:
        model = training.add_lora(model, rank=16, alpha=32, dropout=0.0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    # Sample, and measure.
    manifest = sampling.read_manifest(args.manifest)
    order = sampling.next_slice(len(manifest), 0, args.num_prompts, args.seed)
    examples, embeds = sampling.embed_examples(model, processor, [manifest[n] for n in order], args)
    torch.manual_seed(args.seed)  # encoding audio has set another
    num_groups = args.num_samples // K
    rollouts = sample_rollouts(model, processor.tokenizer, examples * num_groups,
                               embeds * num_groups, K, args)
    for rollout in rollouts:
        rollout["rewards"] = REWARDS[args.reward](rollout)
    columns = measure(model, [rollouts[n::len(examples)] for n in range(len(examples))], weights,
                      args.fork_budget)

    # Write and show.
    reward = statistics.fmean(reward for rollout in rollouts for reward in rollout["rewards"])
    print(f"\n{args.model}, {state['adapter'] or 'no adapter'}, mean reward {reward:.3f}\n")
    print(" " * 16 + "".join(f"{name:>24}" for name in COSINES))
    lines = [",".join(["method", *columns])]
    for m, method in enumerate(METHODS):
        lines.append(",".join([method, *(f"{values[m]:.4f}" for values in columns.values())]))
        line = f"{method:16}"
        for name in COSINES:
            cell = f"{columns[name][m]:.3f}"
            if m > 0:
                cell += f" ({columns[f'{name}_gap'][m]:+.3f} ± {columns[f'{name}_gap_se'][m]:.3f})"
            line += f"{cell:>24}"
        print(line)
    print("\nIn parentheses: minus GRPO, with the standard error of this difference.")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        sampling.save_file(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
