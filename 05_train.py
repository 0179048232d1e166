"""Stage 5: one epoch of policy gradient over this round's rollouts.

The loss is GRPO's clipped surrogate with a KL term; LEAF changes only the advantage of each token.
`--method grpo` trains on the same files with the other advantages. Only a LoRA on the language
model learns; the KL's reference is the model without it, scored in stage 2, so no second copy is
held. As there, a prompt is one row, its trie: what K responses share is computed once. With a GPU,
layers are checkpointed by default, which takes less memory and gives the same gradient.

Reads   RUN/rollouts.pt, RUN/surprisal.pt, RUN/advantages.pt, the model, RUN/adapter if there
Writes  RUN/adapter/, a PEFT adapter with optimizer.pt and training.json; RUN/train.csv, a row per
        optimizer step
Run     python 05_train.py                                       demo, 2 cores: about 8 s
        python 05_train.py --method grpo --run runs/grpo         in a copy of the run's folder

Differs from the paper: LoRA and learning rate are, by default, those that suit the demo; the rate
is constant, unless --total-steps says how long training will be; then 5% warm-up and a cosine to
10%, as in the paper.
"""
import argparse
import json
import math
import shutil
import time
from functools import partial
from importlib import import_module
from pathlib import Path

sampling = import_module("01_sample")
scoring = import_module("02_surprisal")

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

LORA = "lora_rank", "lora_alpha", "lora_dropout"  # options that a run keeps, as it does its method

def reference_kl(logp, logp_ref):
    """k3: an estimate, never negative, of KL(policy | reference) per token, in nats."""
    return torch.exp(logp_ref - logp) - (logp_ref - logp) - 1

def policy_loss(logp, logp_old, logp_ref, advantages, mask, clip_eps, kl_weight):
    """Step 7: clipped surrogate plus KL; mean over a response's tokens, then over responses.

    logp, logp_old, logp_ref, advantages (K, T) float32; mask (K, T) bool, True at tokens, the EOS
    included. Returns a scalar to minimise.
    """
    ratio = torch.exp(logp - logp_old)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    loss = (kl_weight * reference_kl(logp, logp_ref) - surrogate) * mask
    return (loss.sum(dim=1) / mask.sum(dim=1)).mean()

def learning_rate(step, total_steps, peak):
    """Constant if total_steps is 0, else 5% linear warm-up and a cosine to 10% of the peak."""
    if total_steps == 0:
        return peak
    warm_up = math.ceil(0.05 * total_steps)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1, total_steps - warm_up))
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))

def add_lora(model, rank, alpha, dropout):
    """The model with a new LoRA on the language model's linear layers; it changes nothing yet."""
    from peft import LoraConfig, get_peft_model
    decoder = next(name for name, part in model.named_modules() if part is model.get_decoder())
    linear = rf"{decoder}\..*\.(q|k|v|o|gate|up|down)_proj"
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout,
                                            target_modules=linear))

def ready_to_train(model):
    """The model with dropout on in our LoRA alone; all else stays in eval mode."""
    for name, part in model.named_modules():
        if name.endswith("lora_dropout.default"):
            part.train()
        if hasattr(part, "cast_input_dtype_enabled"):  # PEFT's, to float32: each layer would keep
            part.cast_input_dtype_enabled = False  # such a copy; autocast (02) needs none
    return model

def checkpoint_layers(model):
    """Gradient checkpointing: a layer keeps its input alone, and computes the rest once more when
    the gradient comes to it."""
    for layer in model.get_decoder().layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

def load_policy(meta, adapter, args):
    """The model with the LoRA to train: RUN/adapter, or in round 1 a new one."""
    model, _ = sampling.load_model(meta["model"], adapter, args.device, hear=False)
    asked = tuple(getattr(args, name) for name in LORA)
    if adapter:
        config = model.peft_config["default"]
        made = config.r, config.lora_alpha, config.lora_dropout
        if made != asked:
            raise sampling.BadInput(f"{adapter} has rank, alpha and dropout {made}, not {asked}: "
                                    "give the --lora options it was made with")
    else:
        model = add_lora(model, *asked)
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    return ready_to_train(model)

def save_adapter(run, model, optimizer, state):
    """Replace RUN/adapter as a whole: its weights, optimizer and round always belong together."""
    folder, part, previous = (Path(run) / f"adapter{end}" for end in ("", ".part", ".previous"))
    for leftover in (part, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # an empty model card
        sampling.save_tensors(part / "optimizer.pt", optimizer.state_dict())
        sampling.save_text(part / "training.json", json.dumps(state, indent=1))
    except Exception as error:  # safetensors has an exception of its own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        raise sampling.BadInput(f"cannot write {folder}: {error}") from error
    if folder.exists():
        folder.rename(previous)
    part.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)

def append_csv(path, rows, redone=None):
    """Add rows (dicts with the same keys) to a CSV file, except those it holds already; its rows of
    the round `redone` and later go: that training was cut off, or its adapter moved away."""
    written = path.read_text().splitlines() if path.exists() else []
    lines = [",".join(rows[0])]
    for line in written[1:]:
        number = line.split(",")[0]
        if redone is None or not number.isdigit() or int(number) < redone:
            lines.append(line)
    lines += [line for row in rows if (line := ",".join(map(str, row.values()))) not in lines]
    sampling.save_text(path, "\n".join([*lines, ""]))

def print_table(rows):
    """Print rows (dicts with the same keys) under their keys."""
    for row in [dict(zip(rows[0], rows[0])), *rows]:
        print("".join(f"{value:>{max(9, len(name) + 2)}}" for name, value in row.items()))

def parse_args():
    parser = sampling.stage_parser(__doc__, on_cpu=2, on_gpu=4)
    add, count, size = parser.add_argument, sampling.limited(int, 1), sampling.limited(float, 0)
    add("--method", default="leaf", choices=["leaf", "grpo"], help="whose advantages to train on")
    add("--prompts-per-step", type=count, default=4, help="prompts per optimizer step")
    add("--learning-rate", type=size, default=5e-4, help="its peak")
    add("--total-steps", type=sampling.limited(int, 0), default=0,
        help="steps of all rounds; 0: constant rate")
    add("--lora-rank", type=count, default=16, help="rank of the LoRA")
    add("--lora-alpha", type=count, default=32, help="the LoRA is scaled by alpha / rank")
    add("--lora-dropout", type=sampling.limited(float, 0, 1), default=0.0, help="dropout before it")
    add("--clip-eps", type=size, default=0.2, help="the ratio is clipped to 1 -+ this")
    add("--kl-weight", type=size, default=0.02, help="weight of the KL to the reference")
    add("--max-grad-norm", type=size, default=1.0, help="longest gradient; 0: any")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(), help="less memory, half more to compute")
    return sampling.parse_as_before(parser, ["method", *LORA])

def main(args):
    # 1. The files of this round; what all three say of a prompt in one dict.
    rollouts = sampling.load_stage(args.run, "rollouts")
    scores = sampling.load_stage(args.run, "surprisal", rollouts)["prompts"]
    earned = sampling.load_stage(args.run, "advantages", rollouts)["prompts"]
    prompts = [a | b | c for a, b, c in zip(rollouts["prompts"], scores, earned)]
    meta = rollouts["meta"]

    # 2. The policy and its optimizer, as the last round left them.
    state = sampling.read_state(args.run, meta)
    adapter, step = state["adapter"], state["step"]
    torch.manual_seed(1000 * meta["seed"] + meta["round"])
    model = load_policy(meta, adapter, args)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    if adapter:
        try:
            moments = torch.load(adapter / "optimizer.pt", weights_only=True, map_location="cpu")
        except Exception as error:
            raise sampling.BadInput(f"{adapter}/optimizer.pt is not whole: move {adapter} away to "
                                    "start anew") from error
        optimizer.load_state_dict(moments)

    # 3. One epoch: a few prompts a step, one trie a prompt.
    rows, batches = [], sampling.chunks(prompts, args.prompts_per_step)
    for batch in tqdm(batches, desc=f"training, {args.method}", unit="step"):
        began = time.time()
        kl, moved = [], []  # per token
        for part in sampling.chunks(batch, args.prompts_per_batch):
            losses = []
            for logp, prompt in zip(scoring.score_responses(model, part), part):
                old, ref = prompt["logp_old"], prompt["logp_ref"]
                mask = scoring.response_mask(prompt)
                losses.append(policy_loss(logp, old, ref, prompt[args.method], mask,
                                          args.clip_eps, args.kl_weight))
                kl.append(reference_kl(logp, ref).detach()[mask])
                moved.append(torch.exp(logp - old).detach()[mask] - 1)
            (sum(losses) / len(batch)).backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.total_steps, args.learning_rate)
        longest = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, longest).item()
        if not math.isfinite(grad_norm):
            raise sampling.BadInput(f"the gradient of step {step + 1} has the norm {grad_norm}: no "
                                    "step of this round is saved; try a lower --learning-rate")
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        rewards, lengths = (torch.cat([prompt[name] for prompt in batch]).float()
                            for name in ("rewards", "lengths"))
        alike = [len(prompt["rewards"].unique()) == 1 for prompt in batch]
        rows.append({
            "round": meta["round"], "step": step, "method": args.method,
            "reward": f"{rewards.mean():.4f}", "alike": f"{sum(alike) / len(batch):.2f}",
            "kl": f"{torch.cat(kl).mean():.5f}",
            "clipped": f"{(torch.cat(moved).abs() > args.clip_eps).float().mean():.4f}",
            "length": f"{lengths.mean():.1f}", "grad_norm": f"{grad_norm:.3f}",
            "seconds": f"{time.time() - began:.2f}"})

    # 4. Write.
    kept = ("round", "seen", "seed", "manifest", "model", "system_prompt", "raw_prompt")
    state = {name: meta[name] for name in kept if name in meta}
    append_csv(Path(args.run) / "train.csv", rows, redone=meta["round"])
    state |= {"trained_on": meta["id"], "step": step}
    state |= {name: getattr(args, name) for name in ("method", *LORA)}
    save_adapter(args.run, model, optimizer, state)

    # 5. Show.
    print_table(rows)
    print(f"Round {meta['round']} trained -> {args.run}/adapter, {args.run}/train.csv")

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
