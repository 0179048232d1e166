"""06: did it help?

Two models answer the test prompts: the untouched one (base) and the one with the trained adapter.
Each answers a few times by sampling, which shows the policy itself, and once greedily, always with
the most probable token, as a user might have it. Scored by corpus BLEU, case-insensitive as in the
paper, and by exact match: the words of the reference, with case and punctuation.

Reads   a test manifest, the model, RUN/adapter if there; the model and prompt options of the run
        from RUN/adapter/training.json or, before the first training, RUN/rollouts.pt. The manifest
        is not taken from there: it is the demo's unless --manifest is given
Writes  RUN/eval.csv, a row per model: round, step, method, BLEU and exact match (of the greedy
        answers) in 0..100, and what they are of: manifest, prompts, temperature;
        RUN/predictions.jsonl: id, prompt, reference, prediction (greedy), for any other scorer
Run     python 06_eval.py                                        demo, 2 cores: about 25 s
Differs from the paper: nothing.
"""
import argparse
import json
import statistics
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import torch

sampling = import_module("01_sample")
advantage = import_module("04_advantage")

def corpus_bleu(hypotheses, references, lowercase=False):
    """Corpus BLEU, in 0..100, of hypotheses against one reference each (lists of str): the n-grams
    are counted over the corpus. Equal to sacrebleu's, 13a tokens, exponential smoothing."""
    pairs = zip(hypotheses, references, strict=True)
    return 100 * advantage.bleu(pairs, lowercase, effective_order=False)

def answer(model, processor, embeds, args, K, temperature):
    """K answers to each of N prompts: a list of N lists of K str."""
    sampled = sampling.sample_all(model, embeds, args.prompts_per_batch, K, args.max_new_tokens,
                                  temperature, args.top_p)
    tokenizer = processor.tokenizer
    return [sampling.decode_responses(tokenizer, responses, lengths)
            for responses, lengths in sampled]

def scores(sampled, greedy, references):
    """What eval.csv says, as text, of sampled answers (N lists of one per pass) and N greedy ones.
    In an exact match white space does not count."""
    passes = zip(*sampled)  # a pass has one answer to each prompt
    bleus = [corpus_bleu(answers, references, lowercase=True) for answers in passes]
    exact = [text.split() == reference.split() for text, reference in zip(greedy, references)]
    return {"bleu_sampled": f"{statistics.fmean(bleus):.2f}",
            "bleu_sampled_std": f"{advantage.sample_std(bleus):.2f}",
            "bleu_greedy": f"{corpus_bleu(greedy, references, lowercase=True):.2f}",
            "exact_match": f"{100 * statistics.fmean(exact):.1f}"}

def run_settings(run, state):
    """The run's model and prompt options: its adapter's, or its rollouts', or the demo's."""
    settings = {"model": "tests/demo/model", "system_prompt": "", "raw_prompt": False}
    if state["adapter"]:
        settings = state
    elif (Path(run) / "rollouts.pt").exists():
        settings = sampling.load_stage(run, "rollouts")["meta"]
    return {name: settings[name] for name in ("model", "system_prompt", "raw_prompt")}

def parse_args():
    parser = sampling.stage_parser(__doc__, prompts_per_batch=32)
    add = parser.add_argument
    count = sampling.number(int, 1)
    add("--manifest", default="tests/demo/test.jsonl", help="JSON lines: audio, prompt, reference")
    add("--num-prompts", type=count, default=10**9, help="at most so many, the first ones")
    add("--passes", type=count, default=5, help="sampled passes")
    add("--max-new-tokens", type=count, default=200, help="length limit of a response")
    add("--temperature", type=sampling.number(float, 0), default=0.9, help="of the sampled passes")
    add("--top-p", type=sampling.number(float, 0.001, 1), default=0.9, help="of the sampled passes")
    add("--seed", type=sampling.number(int, 0), default=0, help="of the sampling")
    add("--skip-unreadable", action="store_true", help="leave out recordings that cannot be heard")
    own = argparse.SUPPRESS  # no default here: main takes the run's own
    add("--model", default=own, help="folder or hub name (default: the run's, else the demo's)")
    add("--system-prompt", default=own, help="as in 01 (default: the run's)")
    add("--raw-prompt", default=own, action=argparse.BooleanOptionalAction,
        help="leave the chat template out, as in 01 (default: as in the run)")
    return parser.parse_args()

def main(args):
    # Read the test prompts, and load the run's model.
    state = sampling.read_state(args.run)
    sampling.check_flags(args, state, ["model"])
    args = argparse.Namespace(**{**run_settings(args.run, state), **vars(args)})
    examples = sampling.read_manifest(args.manifest)[:args.num_prompts]
    eval_csv = Path(args.run) / "eval.csv"
    lines = sampling.read_lines(eval_csv)  # before the work, in case it cannot be read
    model, processor = sampling.load_model(args.model, state["adapter"], args.device)

    # Answer, with the base and with the adapter, from the same embeddings: the encoder is frozen.
    examples, embeds = sampling.embed_examples(model, processor, examples, args)
    references = [example["reference"] for example in examples]
    without_adapter = model.disable_adapter if state["adapter"] else nullcontext
    policies = [({"round": 0, "step": 0, "method": "base"}, without_adapter)]
    if state["adapter"]:
        trained = {"round": state["round"], "step": state["step"], "method": state["method"]}
        policies.append((trained, nullcontext))
    quoted_manifest = '"' + args.manifest.replace('"', '""') + '"'  # its name may have a comma
    rows = []
    for policy, adapter_context in policies:
        torch.manual_seed(1000 * args.seed)  # the same draws for both
        with adapter_context():
            sampled = answer(model, processor, embeds, args, args.passes, args.temperature)
            greedy_answers = answer(model, processor, embeds, args, K=1, temperature=0)
        greedy = [texts[0] for texts in greedy_answers]
        rows.append({**policy, **scores(sampled, greedy, references), "manifest": quoted_manifest,
                     "prompts": len(examples), "temperature": args.temperature})

    # Write. The predictions are those of the last policy: the trained one, if there is an adapter.
    for cells in [rows[0].keys(), *[row.values() for row in rows]]:
        line = ",".join(map(str, cells))
        if line not in lines:  # the header is there, or the same evaluation
            lines.append(line)
    sampling.save_file(eval_csv, "\n".join(lines) + "\n")
    predictions = ""
    for example, text in zip(examples, greedy):
        prediction = {"id": example["id"], "prompt": example["prompt"],
                      "reference": example["reference"], "prediction": text}
        predictions += json.dumps(prediction, ensure_ascii=False) + "\n"
    sampling.save_file(Path(args.run) / "predictions.jsonl", predictions)

    # Show three answers, and the scores.
    print(f"\n{args.model} on {len(examples)} prompts of {args.manifest} -> {eval_csv}, "
          f"{args.run}/predictions.jsonl")
    for example, text in list(zip(examples, greedy))[:3]:
        print(sampling.printable(f"  {example['prompt']}\n    reference   {example['reference']}\n"
                                 f"    prediction  {text}"))
    shown = [name for name in rows[0] if name not in ("manifest", "prompts", "temperature")]
    widths = [max(9, len(name) + 2) for name in shown]
    print()
    for cells in [shown, *[[row[name] for name in shown] for row in rows]]:
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    print(f"\nTo look at the run: python tests/report.py --run {args.run}")

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
