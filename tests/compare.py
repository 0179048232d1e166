"""Does span credit show in training? Many runs, over methods, learning rates and seeds.

A run trains as 01 to 05 do, with their functions, settings and draws, but in one process, from
recordings encoded once for all runs; the real model in bfloat16, as on a GPU. After every round
the test prompts are answered, with the sampling of 01; a run reports the mean reward of these
answers. Methods with the same seed see the same prompts and, in the first round, the same
responses (sampled once, for all of them). So they are compared in pairs: the reward minus that of
a baseline, GRPO with the paper's floor under its deviation or without, with a 95% interval over
seeds (Student's t). --methods picks some.

bleu    64 prompts x 8 responses, 5 seeds, each method at the best of three learning rates: that
        with the highest mean reward at the end of the first two seeds
k16     32 prompts x 16 responses, 8 seeds, all at 05's learning rate
exact   64 x 8 again, 5 seeds, at 05's rate too, the reward 1 for an exact answer, else 0
real    32 x 8, 5 seeds, at 2e-4, the model of tests/demo/make_real.py, whose answers hold several
        decisions; tested after the last round only, on 64 clips; takes --only real

Run     python tests/compare.py                            2 cores: about 2 hours
        python tests/compare.py --only real --rounds 2     2 cores: about 4 minutes a run
A finished run is a CSV file in --out, a row per test. Stopped, it goes on with those that lack it;
so give another --out, or delete the folder, when the code has changed.
"""
import argparse
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gradients import (REWARDS, advantage, sample_rollouts, sampling, scoring, token_advantages,
                       training, tree)

BASELINES = ["grpo", "grpo-std"]  # with the paper's floor under the deviation, and without one
METHODS = [*BASELINES, "leaf", "td", "tempo", "leaf-all", "global", "local", "multiplicity 0"]
EXPERIMENTS = {"bleu": {"N": 64, "K": 8, "seeds": 5, "reward": "bleu", "task": "demo",
                        "rates": [5e-4, 2e-4, 1e-3]},
               "k16": {"N": 32, "K": 16, "seeds": 8, "reward": "bleu", "task": "demo",
                       "rates": [5e-4]},
               "exact": {"N": 64, "K": 8, "seeds": 5, "reward": "exact", "task": "demo",
                         "rates": [5e-4]},
               "real": {"N": 32, "K": 8, "seeds": 5, "reward": "bleu", "task": "real",
                        "rates": [2e-4]}}
TASKS = {"demo": {"model": "tests/demo/model", "manifest": "tests/demo/train.jsonl",
                  "test": "tests/demo/test.jsonl", "test_clips": 128, "answers": 5,
                  "test_every_round": True, "dtype": torch.float32},
         "real": {"model": "runs/real-model", "manifest": "tests/demo/real/train.jsonl",
                  "test": "tests/demo/real/test.jsonl", "test_clips": 64, "answers": 6,
                  "test_every_round": False, "dtype": torch.bfloat16}}  # as on a GPU, and faster
# The 97.5% quantile of Student's t, by the number of values minus 1.
T95 = [float("nan"), 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


def defaults(stage):
    given = sys.argv
    sys.argv = given[:1]  # as if no flag was given
    args = stage.parse_args()
    sys.argv = given
    return args


def encode_task(out, task):
    """Embeds of a task's training and test prompts, in a file that all runs read."""
    path = out / f"embeds-{task}.pt"
    if not path.exists():
        model, processor = sampling.load_model(TASKS[task]["model"])
        content = []
        for split in ("manifest", "test"):
            examples = sampling.read_manifest(TASKS[task][split])
            read, embeds = sampling.embed_examples(model, processor, examples, defaults(sampling))
            content.append((read, [prompt.to(TASKS[task]["dtype"]) for prompt in embeds]))
        sampling.save_file(path, content)


def score(model, rollouts, prompts_per_batch):
    """Adds to each rollout what 02 says of it."""
    for batch in sampling.chunks(rollouts, prompts_per_batch):
        with torch.inference_mode():
            logp_old = scoring.score_responses(model, batch)
            with model.disable_adapter():
                logp_ref = scoring.score_responses(model, batch)
        for rollout, old, ref in zip(batch, logp_old, logp_ref):
            rollout |= {"logp_old": old, "logp_ref": ref, "surprisal": -old}


def train_round(model, optimizer, rollouts, method, reward, args):
    """What 03, 04 and 05 do with the scored rollouts of a round."""
    for rollout in rollouts:
        rollout["rewards"] = reward(rollout)
        rollout["credit"] = token_advantages(method, rollout, defaults(tree).fork_budget)
        rollout["rewards"] = torch.tensor(rollout["rewards"])
    for batch in sampling.chunks(rollouts, args.prompts_per_step):
        training.train_step(model, optimizer, batch, args)


class Learner:
    """A model with a new LoRA, and the prompts of its task."""

    def __init__(self, out, N, K, reward, task, seed):
        self.N = N
        self.K = K
        self.reward = REWARDS[reward]
        self.seed = seed
        self.answers = TASKS[task]["answers"]
        self.dtype = TASKS[task]["dtype"]
        self.sample_args = defaults(sampling)
        self.train_args = defaults(training)
        self.train_args.method = "credit"
        self.manifest, test = torch.load(out / f"embeds-{task}.pt", weights_only=True)
        self.test = [column[:TASKS[task]["test_clips"]] for column in test]
        model, processor = sampling.load_model(TASKS[task]["model"])
        for weight in model.parameters():  # not the buffers, as in from_pretrained
            weight.data = weight.data.to(self.dtype)
        torch.manual_seed(1000 * seed + 1)  # as 05 in the first round
        self.model = training.add_lora(model, self.train_args.lora_rank,
                                       self.train_args.lora_alpha, self.train_args.lora_dropout)
        self.tokenizer = processor.tokenizer

    def answer(self, examples, embeds, K):
        """K sampled responses to each example; in bfloat16 the LoRA computes in it, as in 02."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype == torch.bfloat16):
            return sample_rollouts(self.model, self.tokenizer, examples, embeds, K,
                                   self.sample_args)

    def sample_round(self, number):
        """The scored rollouts of a round, as from 01 and 02."""
        examples, embeds = self.manifest
        order = sampling.next_slice(len(examples), self.N * number, self.N, self.seed)
        torch.manual_seed(1000 * self.seed + number)  # as 01
        rollouts = self.answer([examples[n] for n in order], [embeds[n] for n in order], self.K)
        score(self.model, rollouts, self.train_args.prompts_per_batch)
        return rollouts

    def test_reward(self):
        """The mean reward, 0..100, of a few sampled answers to each test prompt."""
        torch.manual_seed(1000 * self.seed)
        rollouts = self.answer(*self.test, self.answers)
        return 100 * statistics.fmean(value for rollout in rollouts
                                      for value in self.reward(rollout))


def start_file(out, N, K, reward, task, seed):
    return out / f"start-{task}-{N}x{K}-{reward}-seed_{seed}.pt"


def prepare(out, threads, start):
    """What the runs of all methods begin with, in a file: test reward, rollouts of round 1."""
    torch.set_num_threads(threads)
    sys.stderr = open(os.devnull, "w")  # the bars of several runs at once
    learner = Learner(out, **start)
    content = (learner.test_reward(), learner.sample_round(0))
    sampling.save_file(start_file(out, **start), content)


def one_run(out, method, rate, rounds, kl_weight=None, **start):
    """Train a model for some rounds; {round: mean test reward}, 0 being before the first."""
    learner = Learner(out, **start)
    if kl_weight is not None:
        learner.train_args.kl_weight = kl_weight
    optimizer = training.load_optimizer(learner.model, None)
    optimizer.param_groups[0]["lr"] = rate
    base, rollouts = torch.load(start_file(out, **start), weights_only=True)
    rewards = {0: base}
    for number in range(1, rounds + 1):
        train_round(learner.model, optimizer, rollouts, method, learner.reward,
                    learner.train_args)
        if number == rounds or TASKS[start["task"]]["test_every_round"]:
            rewards[number] = learner.test_reward()
        if number < rounds:
            rollouts = learner.sample_round(number)
    return rewards


def work(out, threads, run):
    """One run, whose rewards go into a CSV file at its end; the file's name."""
    torch.set_num_threads(threads)
    sys.stderr = open(os.devnull, "w")
    rewards = one_run(out, **run)
    lines = ["round,reward\n"] + [f"{n},{value:.3f}\n" for n, value in rewards.items()]
    sampling.save_file(run_file(out, run), "".join(lines))
    return run_file(out, run).stem


def run_file(out, run):
    name = "-".join(f"{key} {value}" for key, value in run.items())
    return out / f"{name}.csv".replace(" ", "_")


def read_run(out, run):
    """{round: mean test reward, 0..100} of a finished run; round 0 is before training."""
    rows = [line.split(",") for line in run_file(out, run).read_text().splitlines()[1:]]
    return {int(number): float(reward) for number, reward in rows}


def start_of(run):
    return {key: run[key] for key in ("N", "K", "reward", "task", "seed")}


def do_all(out, runs, jobs):
    """All the runs that have no file yet, `jobs` at a time."""
    missing = [run for run in runs if not run_file(out, run).exists()]
    starts = {start_file(out, **start): start for start in map(start_of, missing)}
    threads = max(1, os.cpu_count() // jobs)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(prepare, out, threads),
                      [start for path, start in starts.items() if not path.exists()]))
        finished = pool.map(partial(work, out, threads), missing)
        for number, name in enumerate(finished, 1):
            print(f"{number} of {len(missing)}: {name}", flush=True)


def runs_of(experiment, rates, seeds, rounds):
    """The runs of an experiment, dicts: for each seed and method, one at each of its rates."""
    setting = {key: value for key, value in experiment.items()
               if key in ("N", "K", "reward", "task", "kl_weight")}
    return [{**setting, "method": method, "rate": rate, "seed": seed, "rounds": rounds}
            for seed in range(seeds) for method in rates for rate in rates[method]]


def best_rate(out, experiment, method, rates, seeds, rounds):
    """The learning rate with the highest mean of the last rewards."""
    totals = {}
    for rate in rates:
        runs = runs_of(experiment, {method: [rate]}, seeds, rounds)
        totals[rate] = sum(read_run(out, run)[rounds] for run in runs)
    return max(totals, key=totals.get)


def show(out, experiment, rates, seeds, rounds):
    """Print an experiment, as Markdown: for each method its mean reward, and for each baseline the
    differences to it, paired by seed, after each round that was tested."""
    rewards = {}  # by method: a dict {round: reward} for each seed
    for method in rates:
        runs = runs_of(experiment, {method: rates[method]}, seeds, rounds)
        rewards[method] = [read_run(out, run) for run in runs]
    tested = list(rewards[method][0])
    print_row("method", "rate", "before", *(f"round {n}" for n in tested[1:]))
    print_row(*["---"] * (2 + len(tested)))
    for method in rates:
        means = [statistics.fmean(seed[n] for seed in rewards[method]) for n in tested]
        print_row(method, *map(str, rates[method]), *(f"{mean:.1f}" for mean in means))
    excluding = []
    for baseline in (method for method in BASELINES if method in rates and len(rates) > 1):
        print()
        print_row(f"minus {baseline}", *(f"round {n}" for n in tested[1:]))
        print_row(*["---"] * len(tested))
        for method in rates:
            if method not in (baseline, "grpo"):
                intervals = [paired(rewards[method], rewards[baseline], n) for n in tested[1:]]
                excluding += [abs(mean) > half for mean, half in intervals]
                print_row(method, *(f"{mean:+.1f} ± {half:.1f}" for mean, half in intervals))
    if excluding and seeds > 1:
        print(f"\n{sum(excluding)} of {len(excluding)} intervals exclude 0; about "
              f"{0.05 * len(excluding):.0f} would by chance, if nothing differed")


def print_row(*cells):
    print("| " + " | ".join(cells) + " |")


def paired(ours, theirs, number):
    """The mean difference after round `number`, and half the width of its 95% interval."""
    gaps = [one[number] - other[number] for one, other in zip(ours, theirs)]
    return statistics.fmean(gaps), T95[len(gaps) - 1] * advantage.sample_std(gaps) / len(gaps) ** 0.5


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default="runs/compare", help="folder of the finished runs")
    add("--jobs", type=sampling.number(int, 1), default=2, help="runs at a time")
    add("--rounds", type=sampling.number(int, 1), default=4, help="rounds of training in a run")
    add("--only", choices=list(EXPERIMENTS), help="one experiment instead of all but real")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="instead of all")
    add("--seeds", type=int, choices=range(1, 11), help="instead of the experiment's own number")
    add("--rates", nargs="+", type=sampling.number(float, 0),
        help="learning rates, instead of the experiment's own")
    add("--kl-weight", type=sampling.number(float, 0), help="instead of 05's")
    return parser.parse_args()


def main():
    args = parse_args()
    names = [args.only] if args.only else [name for name in EXPERIMENTS if name != "real"]
    args.out.mkdir(parents=True, exist_ok=True)
    for task in {EXPERIMENTS[name]["task"] for name in names}:
        if not Path(TASKS[task]["model"]).exists():
            sys.exit("the real model is not here: `python tests/demo/make_real.py` makes it")
        encode_task(args.out, task)
    for name in names:
        experiment = dict(EXPERIMENTS[name])
        if args.kl_weight is not None:
            experiment["kl_weight"] = args.kl_weight
        seeds = args.seeds or experiment["seeds"]
        candidates = args.rates or experiment["rates"]
        rates = dict.fromkeys(args.methods, candidates)
        if len(candidates) > 1:
            some = min(2, seeds)
            do_all(args.out, runs_of(experiment, rates, some, args.rounds), args.jobs)
            for method in args.methods:
                best = best_rate(args.out, experiment, method, candidates, some, args.rounds)
                rates[method] = [best]
        do_all(args.out, runs_of(experiment, rates, seeds, args.rounds), args.jobs)
        print(f"\n{name}: {experiment}, {seeds} seeds\n")
        show(args.out, experiment, rates, seeds, args.rounds)


if __name__ == "__main__":
    main()
