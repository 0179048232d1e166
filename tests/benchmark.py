"""How fast is sharing prefixes? The stages against the usual way, side by side in one run.

sampling   usual: generate(), the inputs of a prompt repeated K times. ours: each clip encoded once,
           each prompt prefilled once, many prompts decoded together, K responses in a row.
scoring    usual: one padded row per response, prompt included. ours: one trie per prompt.
training   the same two, forward and backward through the LoRA, and AdamW's steps.

The usual way takes a prompt at a time: with its K responses that is a batch of K rows. --generate
gives generate() more. Ours takes as many prompts in a pass as the stages do by default; on a GPU, 32
in sampling and 4 in scoring and training, there with checkpointed layers. Both ways take turns, a
few prompts each, so that a noisy machine disturbs them alike; the responses scored and trained on
are the same. A token is a token of a response, counted K times when shared. On a GPU the table has
the peak of its memory, too.

--config takes a published model at full size on a GPU and shrunk on a CPU (widths, layers and
vocabulary divided by --shrink), with random weights, which is all that time and memory depend on.
Clips last 12.5 s and all answers 35 tokens while sampling. A random model's answers share nothing.
So those scored and trained on are the demo's, made about 35 tokens long: three of five token ids are
written twice, the same in all K, and what was shared stays shared.

Run     python tests/benchmark.py                                demo, 2 cores: two minutes
        python tests/benchmark.py --model Qwen/Qwen2-Audio-7B-Instruct --manifest mine.jsonl
        python tests/benchmark.py --config granite-speech-3.3-2b     one GPU; CPU: --num-prompts 16
"""
import argparse
import functools
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import soundfile
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from families import (PUBLISHED, family_processor, published_config, random_model,
                      stand_in_for_torchaudio)

sampling = import_module("01_sample")
scoring = import_module("02_surprisal")
training = import_module("05_train")
SECONDS = 12.5  # a clip's length, with --config
ANSWER = 35  # an answer's number of tokens, with --config


class Way:
    """Seconds, tokens and peak GPU memory of a way of doing a stage, added up over its turns."""

    def __init__(self):
        self.seconds = 0.0
        self.tokens = 0
        self.peak = 0

    def turn(self, work, items):
        """Run work(items), which returns the number of tokens it handled."""
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        self.tokens += work(items)
        if on_gpu:
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.seconds += time.perf_counter() - began


def generate_usual(model, processor, examples, args):
    """The usual sampling: processor and generate(), everything K times."""
    tokens = 0
    eos = torch.tensor(model.generation_config.eos_token_id, device=model.device)
    rate = sampling.feature_extractor(processor).sampling_rate
    processor.tokenizer.padding_side = "left"
    for batch in sampling.chunks(examples, args.generate):
        texts = []
        waves = []
        for example in batch:
            text = sampling.render_prompt(processor, example["prompt"])
            texts += [text] * args.num_responses
            waves += [sampling.load_audio(example["audio"], rate).numpy()] * args.num_responses
        inputs = processor(text=texts, audio=waves, return_tensors="pt", padding=True).to(
            model.device, model.dtype)
        out = model.generate(**inputs, do_sample=True, temperature=1.0, top_p=0.9, top_k=0,
                             max_new_tokens=args.max_new_tokens, pad_token_id=0,
                             )[:, inputs["input_ids"].shape[1]:]
        ended = torch.isin(out, eos)  # a response counts up to its first EOS
        tokens += (ended.cumsum(dim=1) - ended.long() == 0).sum().item()
    return tokens


def embed_all(model, processor, examples):
    """What the model hears of each example: a list of (P_i, H)."""
    options = SimpleNamespace(system_prompt="", raw_prompt=False, skip_unreadable=False)
    return sampling.embed_examples(model, processor, examples, options)[1]


def sample_shared(model, processor, examples, args):
    """Our sampling, listening included."""
    sampled = sampling.sample_all(model, embed_all(model, processor, examples), len(examples),
                                  args.num_responses, args.max_new_tokens, 1.0, 0.9)
    return sum(lengths.sum().item() for _, lengths in sampled)


def padded_logps(model, prompts):
    """The usual scoring: (K, T) log-probabilities from one row of P + T per response, per prompt."""
    embed = model.get_input_embeddings()
    device = embed.weight.device
    for prompt in prompts:
        responses = prompt["responses"].to(device)
        lengths = prompt["lengths"].to(device)
        K, T = responses.shape
        P = len(prompt["embeds"])
        prefix = prompt["embeds"].to(device, embed.weight.dtype).expand(K, -1, -1)
        mask = torch.arange(P + T, device=device) < P + lengths[:, None]
        half = torch.bfloat16
        with torch.autocast(device.type, half, enabled=embed.weight.dtype == half):
            hidden = model.get_decoder()(inputs_embeds=torch.cat([prefix, embed(responses)], dim=1),
                                         attention_mask=mask, use_cache=False).last_hidden_state
        logits = sampling.logits_of(model, hidden[:, P - 1:-1].flatten(0, 1))  # (K * T, V)
        logps = -torch.nn.functional.cross_entropy(logits, responses.flatten(), reduction="none")
        yield logps.view(K, T).cpu()


def trie_logps(model, prompts, prompts_per_batch):
    """Our scoring: (K, T) per prompt, as 02 and 05 do it."""
    for batch in sampling.chunks(prompts, prompts_per_batch):
        yield from scoring.score_responses(model, batch)


@torch.inference_mode()
def score(logps, model, prompts):
    for _ in logps(model, prompts):
        pass
    return sum(prompt["lengths"].sum().item() for prompt in prompts)


def train(logps, model, optimizer, prompts, prompts_per_batch, prompts_per_step):
    for batch in sampling.chunks(prompts, prompts_per_step):
        for part in sampling.chunks(batch, prompts_per_batch):
            losses = []
            for logp, prompt in zip(logps(model, part), part):
                now = logp.detach()
                mask = scoring.response_mask(prompt)
                losses.append(training.policy_loss(logp, now, now, torch.ones_like(now), mask, 0.2, 0.02))
            sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(prompt["lengths"].sum().item() for prompt in prompts)


def train_shared(model, optimizer, prompts, options):
    """Our training, with 05's options."""
    if options.gradient_checkpointing:
        training.ready_to_train(model, gradient_checkpointing=True)
    tries = functools.partial(trie_logps, prompts_per_batch=options.prompts_per_batch)
    tokens = train(tries, model, optimizer, prompts, options.prompts_per_batch, options.prompts_per_step)
    for layer in model.get_decoder().layers:
        vars(layer).pop("forward", None)  # no checkpoints in the usual way's turn
    return tokens


def options_of(stage, run):
    """A stage's options: its defaults, and on a GPU those that fit one."""
    sys.argv = [stage.__name__, "--run", run]
    if torch.cuda.is_available() and stage is sampling:
        sys.argv += ["--prompts-per-batch", "32"]
    elif torch.cuda.is_available():  # scoring takes the options of training
        sys.argv += ["--prompts-per-batch", "4", "--gradient-checkpointing"]
    return stage.parse_args()


def take_turns(name, usual, ours, items, per_turn=8):
    """Both ways on all items, per_turn at a time; prints their row of the table."""
    usual_way = Way()
    our_way = Way()
    usual(items[:1])  # warm-up
    ours(items[:1])
    for some in sampling.chunks(items, per_turn):
        usual_way.turn(usual, some)
        our_way.turn(ours, some)
    usual_rate = usual_way.tokens / usual_way.seconds
    our_rate = our_way.tokens / our_way.seconds
    line = f"{name:10}{usual_rate:14.0f}{our_rate:14.0f}{our_rate / usual_rate:9.1f} x"
    if torch.cuda.is_available():
        line += f"{usual_way.peak / 2**20:14.0f}{our_way.peak / 2**20:14.0f}"
    print(line, flush=True)


def sampled_prompts(args, run):
    """The prompts of a run of 01, of the model and manifest given, or of the demo."""
    command = [sys.executable, ROOT / "01_sample.py", "--run", run, "--num-prompts",
               args.num_prompts, "--num-responses", args.num_responses]
    if args.config:
        command += ["--manifest", ROOT / "tests/demo/train.jsonl", "--model", ROOT / "tests/demo/model"]
    else:
        command += ["--manifest", args.manifest, "--model", args.model, "--max-new-tokens",
                    args.max_new_tokens]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return sampling.load_stage(run, "rollouts")["prompts"]


def written_longer(rows):
    """Responses (lists of tokens), where three of five token ids are written twice."""
    longer = []
    for row in rows:
        longer.append([])
        for token in row:
            longer[-1] += [token, token] if token % 5 < 3 else [token]
    return longer


def published_model(args, device, run):
    """A model of --config, its processor, and prompts with a clip of noise and the demo's answers."""
    shrink = 1 if device == "cuda" else args.shrink
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    stand_in_for_torchaudio()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tests/demo/model")
    config = published_config(args.config, tokenizer, shrink)
    model = random_model(config, tokenizer, device, dtype)
    processor = family_processor(config, tokenizer)
    model.requires_grad_(False)
    model.generation_config.eos_token_id = [-1]  # never: every answer has the same length
    args.max_new_tokens = ANSWER
    prompts = sampled_prompts(args, run)
    for n, prompt in enumerate(prompts):
        prompt["audio"] = f"{run}/{n}.wav"
        soundfile.write(prompt["audio"], torch.randn(int(SECONDS * 16000)).mul(0.1).numpy(), 16000)
        rows = [row[:length].tolist() for row, length in zip(prompt["responses"], prompt["lengths"])]
        rows = [torch.tensor(row) for row in written_longer(rows)]
        prompt["responses"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        prompt["lengths"] = torch.tensor([len(row) for row in rows])
    return model, processor, prompts, f"{args.config}" + (f" / {shrink}" if shrink > 1 else "")


def describe(name, device, model, prompts, K):
    total = sum(prompt["lengths"].sum().item() for prompt in prompts)
    distinct = sum(len(scoring.build_trie(p["responses"], p["lengths"])[0]) for p in prompts)
    positions = sum(len(prompt["embeds"]) for prompt in prompts) / len(prompts)
    hardware = (torch.cuda.get_device_name() if device == "cuda"
                else f"CPU, {torch.get_num_threads()} threads")
    print(f"{name}, {model.num_parameters() / 1e6:.0f} million parameters, {model.dtype}, on {hardware}\n"
          f"torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%F')}\n"
          f"{len(prompts)} prompts of {positions:.0f} positions, {K} responses each, "
          f"{total / len(prompts) / K:.1f} tokens a response, {distinct / total:.0%} of them when\n"
          "shared beginnings are written once\n")
    memory = f"{'usual MB':>14}{'ours MB':>14}" if device == "cuda" else ""
    print(f"{'':10}{'usual tok/s':>14}{'ours tok/s':>14}{'ratio':>11}{memory}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="tests/demo/model", help="folder or hub name")
    parser.add_argument("--config", choices=PUBLISHED, help="instead: random weights of this size")
    parser.add_argument("--shrink", type=int, default=4, help="divides the sizes of --config on a CPU")
    parser.add_argument("--manifest", default="tests/demo/train.jsonl", help="JSON lines")
    parser.add_argument("--num-prompts", type=int, default=64, help="prompts")
    parser.add_argument("--num-responses", type=int, default=8, help="K")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest response")
    parser.add_argument("--generate", type=int, default=1, help="prompts in a pass of generate()")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as run:
        if args.config:
            model, processor, prompts, name = published_model(args, device, run)
            for prompt, embeds in zip(prompts, embed_all(model, processor, prompts)):
                prompt["embeds"] = embeds
        else:
            name = args.model
            prompts = sampled_prompts(args, run)
            model, processor = sampling.load_model(name, None, device)
        describe(name, device, model, prompts, args.num_responses)
        take_turns("sampling", lambda some: generate_usual(model, processor, some, args),
                   lambda some: sample_shared(model, processor, some, args), prompts,
                   per_turn=options_of(sampling, run).prompts_per_batch)

        model.cpu()  # from here on the language model alone is needed
        for part in (model.get_decoder(), model.get_output_embeddings()):
            part.to(device)
        options = options_of(training, run)
        tries = functools.partial(trie_logps, prompts_per_batch=options.prompts_per_batch)
        take_turns("scoring", lambda some: score(padded_logps, model, some),
                   lambda some: score(tries, model, some), prompts)
        rank, alpha, dropout = (64, 128, 0.05) if args.config else (16, 32, 0.0)
        model = training.ready_to_train(training.add_lora(model, rank, alpha, dropout), False)
        optimizer = torch.optim.AdamW((w for w in model.parameters() if w.requires_grad), lr=0.0)
        take_turns("training",
                   lambda some: train(padded_logps, model, optimizer, some, 1, options.prompts_per_step),
                   lambda some: train_shared(model, optimizer, some, options), prompts)


if __name__ == "__main__":
    main()
