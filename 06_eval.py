"""06: did it help?

Two models answer the test prompts: the untouched one (base) and the one with the trained adapter.
Each answers a few times by sampling, which shows the policy itself, and once greedily, always with
the most probable token, as a user might have it. Corpus BLEU is case-insensitive, as in the paper.
An exact match has the words of the reference, with case and punctuation.

Reads   a test manifest; the model and the prompt options that RUN/adapter was trained with, before
        the first training those of RUN/rollouts.pt
Writes  RUN/eval.csv, a row per model: round, step, method, BLEU and exact match (of the greedy
        answers) in 0..100, and what they are of: manifest, prompts, temperature;
        RUN/predictions.jsonl: id, prompt, reference, prediction (greedy), for any other scorer
Run     python 06_eval.py                                        demo, 2 cores: about 25 s
Differs from the paper: nothing.
"""
import json
import statistics
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import torch

sampling = import_module("01_sample")
advantage = import_module("04_advantage")

def main(args):
    # Read the test prompts, and load the run's model.
    state = sampling.read_state(args.run)
    trained = state if state["adapter"] else sampling.load_stage(args.run, "rollouts")["meta"]
    for name in ("model", "system_prompt", "raw_prompt"):
        setattr(args, name, trained[name])
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
        policies.append(({name: state[name] for name in ("round", "step", "method")}, nullcontext))
    quoted_manifest = '"' + args.manifest.replace('"', '""') + '"'  # its name may have a comma
    rows = []
    for policy, adapter_context in policies:
        torch.manual_seed(1000 * args.seed)  # the same for both
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
    print()
    for cells in [shown, *[[row[name] for name in shown] for row in rows]]:
        print("".join(f"{cell:>{max(9, len(name) + 2)}}" for name, cell in zip(shown, cells)))
    print(f"\nTo look at the run: python tests/report.py --run {args.run}")

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
    In an exact match the amount of white space does not count."""
    passes = zip(*sampled)  # a pass has one answer to each prompt
    bleus = [corpus_bleu(answers, references, lowercase=True) for answers in passes]
    exact = [text.split() == reference.split() for text, reference in zip(greedy, references)]
    return {"bleu_sampled": f"{statistics.fmean(bleus):.2f}",
            "bleu_sampled_std": f"{advantage.sample_std(bleus):.2f}",
            "bleu_greedy": f"{corpus_bleu(greedy, references, lowercase=True):.2f}",
            "exact_match": f"{100 * statistics.fmean(exact):.1f}"}

def parse_args():
    parser = sampling.stage_parser(__doc__, prompts_per_batch=32)
    add = parser.add_argument
    add("--manifest", default="tests/demo/test.jsonl", help="JSON lines: audio, prompt, reference")
    add("--num-prompts", type=sampling.number(int, 1), default=10**9, help="only the first N")
    add("--passes", type=sampling.number(int, 1), default=5, help="sampled passes")
    add("--max-new-tokens", type=sampling.number(int, 1), default=200, help="limit of a response")
    add("--temperature", type=sampling.number(float, 0), default=0.9, help="of the sampled passes")
    add("--top-p", type=sampling.number(float, 0.001, 1), default=0.9, help="of the sampled passes")
    add("--seed", type=sampling.number(int, 0), default=0, help="of the sampling")
    add("--skip-unreadable", action="store_true", help="leave out recordings that cannot be heard")
    return parser.parse_args()

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
