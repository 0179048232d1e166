"""05: what does the model learn from it?

One epoch of policy gradient over the rollouts of the round. The loss is GRPO's clipped surrogate
with a KL term. LEAF changes only the advantage of each token: `--method grpo`, `td` and `tempo`
take the others of the same files. Only a LoRA on the language model learns. The reference of the
KL is the model without it, scored in 02. As in 02, a prompt is one row, its trie.

An update follows the gradient of a few prompts. Its line says: reward, the mean of 01's responses:
it can rise from round to round, not within one; alike, the share of prompts with all rewards equal,
so no advantage; kl, from the reference, in nats per token; clipped, the share of tokens whose ratio
(p now / p in 01) is outside 1 ± eps; length, in tokens; grad, the norm before it is clipped. Not a
loss: at ratio 1 that is minus the mean advantage, near 0 whatever the model has learned.

Sizes   N prompts in the round, K responses to each, T tokens in the longest
Reads   RUN/rollouts.pt, RUN/surprisal.pt, RUN/advantages.pt, the model, RUN/adapter if there
Writes  RUN/adapter/ (PEFT format, with optimizer.pt and training.json), RUN/train.csv
Run     python 05_train.py                                       demo, 2 cores: about 8 s
Differs from the paper: it samples 6 prompts for each update, so every ratio is 1. Here N prompts
make N / 4 updates: the policy moves away from the one that sampled, and the clip has work to do.
LoRA and rate suit the demo. The rate is constant unless --total-steps gives the paper's schedule.
"""
import argparse
import json
import math
import shutil
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

sampling = import_module("01_sample")
scoring = import_module("02_surprisal")

LINE = ("step {step} | reward {reward:.2f} | alike {alike:.2f} | kl {kl:.4f} | clipped "
        "{clipped:.1%} | length {length:.1f} | grad {grad_norm:.2f} | {seconds:.1f} s")

def main(args):
    # Read the files of this round; a rollout gets all that they say of its prompt.
    sampled = sampling.load_stage(args.run, "rollouts")
    scores = sampling.load_stage(args.run, "surprisal", sampled)
    advantages = sampling.load_stage(args.run, "advantages", sampled)
    prompts = zip(sampled["prompts"], scores["prompts"], advantages["prompts"])
    rollouts = [{**rollout, **score, **advantage} for rollout, score, advantage in prompts]
    settings = {**advantages["meta"], **vars(args)}  # of 01 to 05
    state = sampling.read_state(args.run, sampled)
    if (Path(args.run) / "adapter").is_symlink():
        raise sampling.UserError(f"{args.run}/adapter is a link: make {args.run} a link instead")
    train_csv = Path(args.run) / "train.csv"
    lines = earlier_lines(train_csv, settings["round"])

    # Load policy and optimizer as the last round left them.
    torch.manual_seed(1000 * settings["seed"] + settings["round"])
    model = load_policy(settings, state["adapter"], args)
    optimizer = load_optimizer(model, state["adapter"])

    # Train.
    step = state["step"]
    updates = sampling.chunks(rollouts, args.prompts_per_step)
    for update in tqdm(updates, desc=f"training, {args.method}", unit="update"):
        began = time.time()
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.total_steps, args.learning_rate)
        statistics = train_step(model, optimizer, update, args)
        step += 1
        row = {"round": settings["round"], "step": step, "method": args.method, **statistics,
               "seconds": time.time() - began}
        tqdm.write(LINE.format(**row), file=sys.stderr)
        values = [f"{x:.5g}" if isinstance(x, float) else str(x) for x in row.values()]
        if not lines:
            lines.append(",".join(row.keys()))
        lines.append(",".join(values))
        sampling.save_file(train_csv, "\n".join(lines) + "\n")

    # Write. The settings bring along the round and the number of prompts seen, from 01.
    trained = {**settings, "policy_id": settings["id"], "step": step}
    for name in ("run", "device", "lora_rank", "lora_alpha", "lora_dropout"):
        del trained[name]  # the first two may change, the others are in adapter_config.json
    save_adapter(args.run, model, optimizer, trained)
    print(f"Round {settings['round']}: {len(updates)} updates -> {args.run}/adapter, {train_csv}")

def train_step(model, optimizer, rollouts, args):
    """One update from a few rollouts, with their surprisal and advantages; a dict of statistics."""
    kl = []
    ratios = []
    for batch in sampling.chunks(rollouts, args.prompts_per_batch):
        losses = []
        for logp, rollout in zip(scoring.score_responses(model, batch), batch):
            mask = scoring.response_mask(rollout)
            advantages = rollout[args.method]  # (K, T)
            losses.append(policy_loss(logp, rollout["logp_old"], rollout["logp_ref"], advantages,
                                      mask, args.clip_eps, args.kl_weight))
            kl.append(reference_kl(logp, rollout["logp_ref"]).detach()[mask])
            ratios.append(torch.exp(logp - rollout["logp_old"]).detach()[mask])
        (sum(losses) / len(rollouts)).backward()  # the batches add up to the mean over prompts
    weights = optimizer.param_groups[0]["params"]
    grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm or math.inf).item()
    optimizer.step()
    optimizer.zero_grad()
    if not all(weight.isfinite().all() for weight in weights):
        raise sampling.UserError(f"an update, of gradient norm {grad_norm}, ended in NaN or "
                                 "infinity: this round is not saved; lower --learning-rate")
    rewards = [rollout["rewards"] for rollout in rollouts]  # (K,) each
    lengths = torch.cat([rollout["lengths"] for rollout in rollouts])
    outside = (torch.cat(ratios) - 1).abs() > args.clip_eps
    alike = sum(len(prompt_rewards.unique()) == 1 for prompt_rewards in rewards) / len(rewards)
    return {"reward": torch.cat(rewards).mean().item(), "alike": alike,
            "kl": torch.cat(kl).mean().item(), "clipped": outside.float().mean().item(),
            "length": lengths.float().mean().item(), "grad_norm": grad_norm}

def policy_loss(logp, logp_old, logp_ref, advantages, mask, clip_eps, kl_weight):
    """Step 8: clipped surrogate plus KL; mean over a response's tokens, then over responses.
    logp, logp_old, logp_ref, advantages (K, T) float32; mask (K, T) bool, True at tokens, the EOS
    included -> a scalar to minimise."""
    ratio = torch.exp(logp - logp_old)
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    # The gradient is zero only if the ratio is past 1 ± eps in the direction of the advantage.
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    loss = (kl_weight * reference_kl(logp, logp_ref) - surrogate) * mask
    return (loss.sum(dim=1) / mask.sum(dim=1)).mean()

def reference_kl(logp, logp_ref):
    """An estimate of KL(policy | reference) per token, in nats: Schulman's k3, never negative."""
    log_ratio = logp_ref - logp
    return torch.exp(log_ratio) - log_ratio - 1

def learning_rate(step, total_steps, peak):
    """Constant if total_steps is 0, else 5% linear warm-up and a cosine to 10% of the peak."""
    if total_steps == 0:
        return peak
    warm_up = math.ceil(0.05 * total_steps)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, total_steps - warm_up))
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))

# -- The policy, its LoRA and its optimizer. -----------------------------------------------------
def load_policy(settings, adapter, args):
    """The model with the LoRA to train: the run's adapter, as it is, or a new one by the flags."""
    model, _ = sampling.load_model(settings["model"], adapter, args.device, audio=False)
    if not adapter:
        model = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    return ready_to_train(model, args.gradient_checkpointing)

def add_lora(model, rank, alpha, dropout):
    """The model with a new LoRA on the language model's linear layers. It changes nothing yet: B,
    one of its two matrices, begins at 0."""
    from peft import LoraConfig, get_peft_model
    inside = set(model.get_decoder().layers.modules())  # an audio encoder has a q_proj, too
    linear = [name for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and module in inside]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout,
                                            target_modules=linear))

def ready_to_train(model, gradient_checkpointing):
    """The model with dropout on in our LoRA alone. With gradient checkpointing a layer keeps its
    input and recomputes the rest in the backward pass: less memory, the same gradient."""
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default"):  # PEFT calls our adapter "default"
            module.train()
    if gradient_checkpointing:  # that of transformers needs train mode, with every dropout on
        for layer in model.get_decoder().layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model

def load_optimizer(model, adapter):
    """AdamW on the LoRA's weights, with the moments that the last round left in the adapter."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    if adapter:
        path = adapter / "optimizer.pt"
        with sampling.as_user_error(f"{path} is broken (delete {adapter} to start over)"):
            optimizer.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return optimizer

def save_adapter(run, model, optimizer, state):
    """Replace RUN/adapter as a whole: its weights, optimizer and state always belong together."""
    part = Path(run) / "adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    with sampling.as_user_error(f"cannot write {run}/adapter"):
        model.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # an empty model card
        sampling.save_file(part / "optimizer.pt", optimizer.state_dict())
        sampling.save_file(part / "training.json", json.dumps(state, indent=1))  # last: complete
    sampling.replace_adapter(run)

def earlier_lines(path, this_round):
    """The lines of train.csv without the rows that a stopped training of this round has left."""
    return [line for line in sampling.read_lines(path)
            if not (number := line.split(",")[0]).isdecimal() or int(number) < this_round]

def parse_args():
    parser = sampling.stage_parser(__doc__, prompts_per_batch=2)
    add = parser.add_argument
    count = sampling.number(int, 1)
    size = sampling.number(float, 0)
    add("--method", default="leaf", choices=["leaf", "grpo", "td", "tempo"], help="whose credit")
    add("--prompts-per-step", type=count, default=4, help="prompts per update")
    add("--learning-rate", type=size, default=5e-4, help="peak learning rate")
    add("--total-steps", type=sampling.number(int, 0), default=0, help="of all rounds; 0: constant")
    add("--lora-rank", type=count, default=16, help="rank of a new LoRA")
    add("--lora-alpha", type=count, default=32, help="a new LoRA is scaled by alpha / rank")
    add("--lora-dropout", type=sampling.number(float, 0, 1), default=0.0, help="of a new LoRA")
    add("--clip-eps", type=size, default=0.2, help="the ratio is clipped to 1 ± eps")
    add("--kl-weight", type=size, default=0.02, help="weight of the KL to the reference")
    add("--max-grad-norm", type=size, default=1.0, help="gradient-norm clip, 0 = off")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="less memory, about half more time")
    return parser.parse_args()

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
