"""Stage 6: did it help?

The test prompts are answered by the untouched model (base) and with the trained adapter, sampled
and greedy, and scored by corpus BLEU, case-insensitive as in the paper. Sampled BLEU judges the
policy itself; greedy BLEU what a user gets who always takes the likeliest token.

Reads   a test manifest, the model, RUN/adapter if there; before the first training RUN/rollouts.pt,
        if there, for the run's model and prompt settings
Writes  RUN/eval.csv, a row per model, BLEU and exact match (of greedy answers) in 0..100;
        RUN/predictions.jsonl: id, prompt, reference, prediction (greedy), for any other scorer
Run     python 06_eval.py                                        demo, 2 cores: about 25 s
"""
import argparse
import json
import statistics
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

sampling = import_module("01_sample")
credit = import_module("04_advantage")
training = import_module("05_train")

import torch

GROUP = 256  # prompts whose embeddings are in memory together

def corpus_bleu(hypotheses, references, lowercase=False):
    """Corpus BLEU, in 0..100, of hypotheses against one reference each (lists of str).

    The n-gram counts are summed over the corpus first. Equal to sacrebleu's corpus_bleu with 13a
    tokens and exponential smoothing.
    """
    counts = [credit.bleu_counts(*pair, lowercase)
              for pair in zip(hypotheses, references, strict=True)]
    summed = [sum(count) for count in zip([0] * 10, *counts)]
    return 100 * credit.bleu_score(summed, effective_order=False)

def answers(model, processor, embeds, args, seed):
    """For each of N prompts a list of texts: --passes sampled ones and, last, the greedy one."""
    def ask(K, temperature):
        sampled = sampling.sample_all(model, embeds, args.prompts_per_batch, K,
                                      args.max_new_tokens, temperature, args.top_p)
        return [processor.tokenizer.batch_decode([row[:n] for row, n in zip(*pair)],
                                                 skip_special_tokens=True) for pair in sampled]

    torch.manual_seed(seed)  # the same for every model
    return [many + one for many, one in zip(ask(args.passes, args.temperature), ask(1, 0))]

def scores(texts, references):
    """The columns of eval.csv for the texts of one model, a list per prompt (see answers)."""
    *passes, greedy = zip(*texts)
    bleus = [corpus_bleu(sampled, references, lowercase=True) for sampled in passes]
    exact = [text.split() == reference.split() for text, reference in zip(greedy, references)]
    return {"bleu_sampled": f"{statistics.fmean(bleus):.2f}",
            "bleu_sampled_std": f"{credit.spread(bleus):.2f}",
            "bleu_greedy": f"{corpus_bleu(greedy, references, lowercase=True):.2f}",
            "exact_match": f"{100 * statistics.fmean(exact):.1f}"}

def run_settings(run):
    """Which model and prompt the run is about: its adapter says so or, before the first training,
    its rollouts."""
    state = sampling.read_state(run)
    untrained = not state["adapter"] and (Path(run) / "rollouts.pt").exists()
    return sampling.load_stage(run, "rollouts")["meta"] if untrained else state

def parse_args():
    parser = sampling.stage_parser(__doc__, on_cpu=32, on_gpu=32)
    add, count, limited = parser.add_argument, sampling.limited(int, 1), sampling.limited
    add("--manifest", default="tests/demo/test.jsonl", help="JSON lines: audio, prompt, reference")
    add("--num-prompts", type=count, help="only the first so many")
    add("--passes", type=count, default=5, help="sampled passes")
    add("--max-new-tokens", type=count, default=200, help="longest response")
    add("--temperature", type=limited(float, 0), default=0.9, help="of the sampled passes")
    add("--top-p", type=limited(float, 0.001, 1), default=0.9, help="of the sampled passes")
    add("--model", default="tests/demo/model", help="folder or hub name")
    add("--system-prompt", default="", help="as in 01")
    add("--raw-prompt", action=argparse.BooleanOptionalAction, default=False, help="as in 01")
    add("--seed", type=limited(int, 0), default=0, help="of the sampling")
    return sampling.parse_as_before(parser, ["model", "system_prompt", "raw_prompt"], run_settings)

def main(args):
    # 1. The test prompts, and the model; both as the run has them.
    state, examples = sampling.read_state(args.run), sampling.read_manifest(args.manifest)
    sampling.check_model(state, args.model)
    examples = examples[:args.num_prompts]
    references = [example["reference"] for example in examples]
    model, processor = sampling.load_model(args.model, state["adapter"], args.device)

    # 2. Base, then adapter, on the same embeddings: training leaves the audio tower as it is.
    models = [({"round": 0, "step": 0, "method": "base"},
               model.disable_adapter if state["adapter"] else nullcontext)]
    if state["adapter"]:
        models.append(({name: state[name] for name in ("round", "step", "method")}, nullcontext))
    texts = [[] for _ in models]
    for number, group in enumerate(sampling.chunks(examples, GROUP)):
        embeds = list(sampling.embed_examples(model, processor, group, args.system_prompt,
                                              args.raw_prompt))
        for (_, switched), found in zip(models, texts):
            with switched():
                found += answers(model, processor, embeds, args, args.seed + number)
    rows = [{**head, **scores(found, references)} for (head, _), found in zip(models, texts)]
    greedy = [answered[-1] for answered in texts[-1]]

    # 3. Write.
    training.append_csv(Path(args.run) / "eval.csv", rows)
    lines = [json.dumps({**{name: example[name] for name in ("id", "prompt", "reference")},
                         "prediction": text}, ensure_ascii=False) + "\n"
             for example, text in zip(examples, greedy)]
    sampling.save_text(Path(args.run) / "predictions.jsonl", "".join(lines))

    # 4. Show.
    print(f"\n{len(examples)} test prompts -> {args.run}/eval.csv, {args.run}/predictions.jsonl")
    for example, text in list(zip(examples, greedy))[:3]:
        print(f"  {example['prompt']}\n    wanted    {example['reference']}\n    answered  {text}")
    print()
    training.print_table(rows)

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
