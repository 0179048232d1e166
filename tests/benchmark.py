"""How fast is sharing prefixes? The stages against the usual way, side by side in one run.

sampling   usual: generate() for each prompt, its inputs repeated K times. ours: each clip encoded
           once, each prompt prefilled once, all rows decoded together, ended rows dropped.
scoring    usual: one padded row per response, prompt included. ours: one trie per prompt.
training   the same two, forward and backward through the LoRA.

Both ways take turns, a few prompts each, so that a noisy machine disturbs them alike; the responses
scored and trained on are the same. A token is a token of a response, counted K times when shared.
Memory is the peak of the GPU's, or of the resident process on a CPU (Linux).

Run     python tests/benchmark.py                                demo, 2 cores: a minute and a half
        python tests/benchmark.py --model Qwen/Qwen2-Audio-7B-Instruct --manifest mine.jsonl
"""
import argparse
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sampling, scoring, training = map(import_module, ("01_sample", "02_surprisal", "05_train"))


class Way:
    """Seconds, tokens and peak memory of one way of doing a stage, added up over its turns."""

    def __init__(self):
        self.seconds = self.tokens = self.peak = 0

    def turn(self, work, *args):
        """Run work(*args), which returns the number of tokens it handled."""
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        began = time.perf_counter()
        self.tokens += work(*args)
        if on_gpu:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        status = "" if on_gpu else Path("/proc/self/status").read_text()
        peak = torch.cuda.max_memory_allocated() if on_gpu else (
            1024 * int(status.split("VmHWM:")[1].split()[0]))
        self.peak = max(self.peak, peak)


def generate_each(model, processor, examples, args):
    """The usual sampling: processor and generate() per prompt, everything K times."""
    tokens, eos = 0, torch.tensor(model.generation_config.eos_token_id, device=model.device)
    extractor = getattr(processor, "feature_extractor", None) or processor.audio_processor
    for example in examples:
        text = sampling.render_prompt(processor, example["prompt"])
        wave = sampling.load_audio(example["audio"], extractor.sampling_rate).numpy()
        inputs = processor(text=[text] * args.num_responses, audio=[wave] * args.num_responses,
                           return_tensors="pt", padding=True).to(model.device)
        out = model.generate(**inputs, do_sample=True, temperature=1.0, top_p=0.9, top_k=0,
                             max_new_tokens=args.max_new_tokens,
                             pad_token_id=int(eos[0]))[:, inputs["input_ids"].shape[1]:]
        ended = torch.isin(out, eos)  # a response counts up to its first EOS
        tokens += (ended.cumsum(dim=1) - ended.long() == 0).sum().item()
    return tokens


def sample_shared(model, processor, examples, args):
    """Our sampling, listening included."""
    embeds = sampling.embed_examples(model, processor, examples, "", False)
    sampled = sampling.sample_all(model, embeds, 16, args.num_responses, args.max_new_tokens, 1.0, 0.9)
    return sum(lengths.sum().item() for _, lengths in sampled)


def padded_logps(model, prompt):
    """The usual scoring: (K, T) log-probabilities from one row of P + T per response."""
    responses, lengths = prompt["responses"].to(model.device), prompt["lengths"].to(model.device)
    (K, T), P = responses.shape, len(prompt["embeds"])
    embed = model.get_input_embeddings()
    prefix = prompt["embeds"].to(model.device, embed.weight.dtype).expand(K, -1, -1)
    mask = torch.arange(P + T, device=model.device) < P + lengths[:, None]
    hidden = model.get_decoder()(inputs_embeds=torch.cat([prefix, embed(responses)], dim=1),
                                 attention_mask=mask, use_cache=False).last_hidden_state
    logits = sampling.logits_of(model, hidden[:, P - 1:-1])  # (K, T, V)
    return -torch.nn.functional.cross_entropy(logits.transpose(1, 2), responses, reduction="none")


def trie_logps(model, prompt):
    """Our scoring: (K, T) from one row of P + M, the trie laid out included."""
    tokens, parents, depths, node = scoring.build_trie(prompt["responses"], prompt["lengths"])
    return scoring.trie_logps(model, prompt["embeds"], tokens, parents, depths)[node.to(model.device)]


@torch.inference_mode()
def score(logps, model, prompts):
    for prompt in prompts:
        logps(model, prompt).cpu()
    return sum(prompt["lengths"].sum().item() for prompt in prompts)


def train(logps, model, prompts):
    for prompt in prompts:
        logp = logps(model, prompt)
        mask = torch.arange(logp.shape[1]) < prompt["lengths"][:, None]
        ones = torch.ones_like(logp)
        training.policy_loss(logp, logp.detach(), logp.detach(), ones, mask.to(logp.device), 0.2,
                             0.02).backward()
        model.zero_grad()
    return sum(prompt["lengths"].sum().item() for prompt in prompts)


def take_turns(name, usual, ours, items, per_turn=8):
    """Both ways on all items, per_turn at a time; prints their row of the table."""
    ways = Way(), Way()
    usual(items[:1]), ours(items[:1])  # warm-up
    for start in range(0, len(items), per_turn):
        for way, work in zip(ways, (usual, ours)):
            way.turn(work, items[start:start + per_turn])
    rates = [way.tokens / way.seconds for way in ways]
    print(f"{name:10}{rates[0]:14.0f}{rates[1]:14.0f}{rates[1] / rates[0]:9.1f} x"
          f"{ways[0].peak / 2**20:14.0f}{ways[1].peak / 2**20:14.0f}", flush=True)


def seconds_of(*command):
    began = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="tests/demo/model", help="folder or hub name")
    parser.add_argument("--manifest", default="tests/demo/train.jsonl", help="JSON lines")
    parser.add_argument("--num-prompts", type=int, default=64, help="prompts")
    parser.add_argument("--num-responses", type=int, default=8, help="K")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest response")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as run:
        seconds_of("01_sample.py", "--run", run, "--manifest", args.manifest, "--model", args.model,
                   "--num-prompts", args.num_prompts, "--num-responses", args.num_responses,
                   "--max-new-tokens", args.max_new_tokens)
        seconds_of("02_surprisal.py", "--run", run)
        rollouts = sampling.load_stage(run, "rollouts")
        tree, advantage = (seconds_of(stage, "--run", run) for stage in ("03_tree.py", "04_advantage.py"))
        bare = seconds_of("-c", "import torch")
    prompts = rollouts["prompts"]
    total = sum(prompt["lengths"].sum().item() for prompt in prompts)
    distinct = sum(len(scoring.build_trie(p["responses"], p["lengths"])[0]) for p in prompts)
    heard = sum(len(prompt["embeds"]) for prompt in prompts) / len(prompts)
    print(f"{args.model} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
          f"{len(prompts)} prompts of {heard:.0f} positions,\n{args.num_responses} responses each, "
          f"{total / len(prompts) / args.num_responses:.1f} tokens a response, {distinct / total:.0%} of "
          "them after sharing beginnings\n")
    print(f"{'':10}{'usual tok/s':>14}{'ours tok/s':>14}{'ratio':>11}{'usual MB':>14}{'ours MB':>14}")

    model, processor = sampling.load_model(args.model, None, device)
    torch.manual_seed(0)
    take_turns("sampling", lambda some: generate_each(model, processor, some, args),
               lambda some: sample_shared(model, processor, some, args), prompts, per_turn=16)
    take_turns("scoring", lambda some: score(padded_logps, model, some),
               lambda some: score(trie_logps, model, some), prompts)
    settings = argparse.Namespace(lora_rank=16, lora_alpha=32, lora_dropout=0.0, device=device)
    model = training.load_policy({"model": args.model}, None, settings)
    take_turns("training", lambda some: train(padded_logps, model, some),
               lambda some: train(trie_logps, model, some), prompts)
    print(f"\n03_tree.py {tree:.1f} s, 04_advantage.py {advantage:.1f} s, of which `import torch` takes "
          f"{bare:.1f} s each")


if __name__ == "__main__":
    main()
