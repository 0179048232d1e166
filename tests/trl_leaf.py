"""LEAF on more than one GPU: can a library for distributed training do it?

TRL's GRPOTrainer can: it takes an advantage for each token. A prompt is text to it, of virtual
tokens that embed as what 01 hears. "trap:" is where TRL alone trains without an error, not LEAF.

Writes  RUN/adapter for 06, once; RUN/checkpoints-*, from which the same command goes on if stopped
Run     accelerate launch tests/trl_leaf.py --max-steps 16                    demo, 2 cores: 1 min
        accelerate launch tests/trl_leaf.py --model NAME --manifest FILE --run RUN
Differs from the six scripts: an update samples prompts of its own, so each ratio is 1; a response
is a row, not part of a trie; defaults are the paper's, or for the demo's model the demo's.
"""
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from gradients import advantage, sampling, scoring, token_advantages, training
try:
    import trl
    from trl.trainer.grpo_trainer import Dataset, unwrap_model_for_generation
    assert trl.__version__ == "1.16.0", trl.__version__  # others may not call what is replaced here
except (ImportError, AssertionError) as error:
    sys.exit(f"trl_leaf.py lacks a library: pip install trl==1.16.0 ({error})")

PAPER = {"model": "tests/demo/model", "manifest": "tests/demo/train.jsonl", "system_prompt": "",
         "num_responses": 8, "fork_budget": 2, "kl_weight": 0.02, "max_steps": 0, "save_steps": 50,
         "seed": 0, "prompts_per_step": 6, "learning_rate": 5e-6, "lora_rank": 64,
         "lora_alpha": 128, "lora_dropout": 0.05, "schedule": "cosine_warmup_with_min_lr"}
DEMO = {"prompts_per_step": 4, "learning_rate": 5e-4, "lora_rank": 16, "lora_alpha": 32,
        "lora_dropout": 0.0, "schedule": "constant"}
HELP = {"max_steps": "updates; 0: each prompt once", "save_steps": "updates between checkpoints",
        **{name: f"as in 05; for the demo's model {value}" for name, value in DEMO.items()}}

def main(args):
    # Take the prompts in the order of 01, and hear those that TRL will give to this process.
    if Path(args.run, "adapter").exists():
        raise sampling.UserError(f"{args.run} has an adapter: it is finished, take another --run")
    config = trl_config(args)
    manifest = sampling.read_manifest(args.manifest)
    N = args.prompts_per_step
    steps = args.max_steps or max(1, len(manifest) // N)
    order = [manifest[n] for n in sampling.next_slice(len(manifest), 0, steps * N, args.seed)]
    mine = [n for n in range(steps * N) if n % N * config.world_size // N == config.process_index]
    model, processor = sampling.load_model(args.model, device=config.device)
    examples, embeds = sampling.embed_examples(model, processor, [order[n] for n in mine], args)
    prompts = dict(zip(mine, zip(examples, embeds)))

    # Train a new LoRA.
    torch.manual_seed(1000 * args.seed + 1)  # as 05 in its first round
    model = training.add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    training.ready_to_train(model, args.gradient_checkpointing)
    trainer = LeafTrainer(model, processor.tokenizer, prompts, args, config)
    trainer.train(resume_from_checkpoint=any(Path(config.output_dir).glob("checkpoint-*")))

    # Write.
    trainer.save_model(f"{args.run}/adapter.part")  # in all processes
    if trainer.is_world_process_zero():
        state = {**vars(args), "round": steps, "step": steps, "policy_id": "trl"}
        sampling.save_file(f"{args.run}/adapter.part/training.json", json.dumps(state, indent=1))
        sampling.replace_adapter(args.run)
        print(f"{steps} updates -> {args.run}/adapter")

class LeafTrainer(trl.GRPOTrainer):
    def __init__(self, model, tokenizer, prompts, args, config):  # for a processor TRL wants images
        self.work = prompts, args
        numbers = [str(n) for n in range(len(prompts) * config.world_size)]
        super().__init__(model, reward, config, Dataset.from_dict({"prompt": numbers}),
                         rollout_func=self.rollout, processing_class=tokenizer)
        if config.beta:  # trap: the KL's reference is a copy of our LoRA or, without it, the base
            model.delete_adapter("ref")
        model.train = lambda *_: model  # trap: or all dropout is on, not that of our LoRA alone
        self.embed_text = model.get_input_embeddings().forward
        model.get_input_embeddings().forward = self.embed

    def embed(self, ids):
        """Token ids (..., L) -> (..., L, H). Negative ones are virtual: positions in a prompt."""
        if ids.min() >= 0:
            return self.embed_text(ids)
        heard = self.heard[ids.clamp(max=-1)]
        return heard.where(ids[..., None] < 0, self.embed_text(ids.clamp(min=0)))

    @torch.no_grad()
    def rollout(self, numbers, _):
        """01 to 04, K rows a prompt. On-policy TRL makes no old log-probabilities, but 02 does."""
        prompts, args = self.work
        K = self.num_generations  # a process holds whole groups: its batch is K rows, too
        examples, embeds = zip(*[prompts[int(number)] for number in numbers[::K]])
        self.heard = torch.cat(embeds).to(self.args.device)
        virtual = torch.arange(-len(self.heard), 0).split([len(heard) for heard in embeds])
        rows = {"prompt_ids": [], "completion_ids": [], "rewards": [], "logprobs": None}
        self.advantages = []
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            model.get_base_model().eval()  # without dropout in our LoRA
            sampled = sampling.sample_responses(model, embeds, K, 200, 1.0, 0.9)
            for n, (responses, lengths) in enumerate(sampled):
                rollout = dict(examples[n], embeds=embeds[n], responses=responses, lengths=lengths)
                rollout["texts"] = sampling.decode_responses(self._tokenizer, responses, lengths)
                rollout["rewards"] = advantage.prompt_rewards(rollout)
                rollout["surprisal"] = -scoring.score_responses(model, [rollout])[0]
                if self.state.global_step == 0:
                    scoring.check_trie(model, rollout)
                self.advantages += token_advantages(args.method, rollout, args.fork_budget)
                rows["prompt_ids"] += K * [virtual[n].tolist()]
                rows["completion_ids"] += [row[:T].tolist() for row, T in zip(responses, lengths)]
                rows["rewards"] += rollout["rewards"]
            training.ready_to_train(model, gradient_checkpointing=False)
        return rows

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        advantages = torch.nn.utils.rnn.pad_sequence(self.advantages, batch_first=True)  # (rows, T)
        return {**output, "advantages": advantages.to(self.args.device)}

def reward(rewards, **_):
    return rewards

def trl_config(args):
    """trap: by default TRL has another loss, no KL or one times the ratio, and a rate of 1e-6."""
    passes, rest = divmod(args.prompts_per_step, int(os.environ.get("WORLD_SIZE", 1)))
    if rest:
        raise sampling.UserError("--prompts-per-step is no multiple of the number of processes")
    settings = hashlib.sha256(repr(sorted(vars(args).items())).encode()).hexdigest()[:8]
    return trl.GRPOConfig(
        output_dir=f"{args.run}/checkpoints-{settings}", save_steps=args.save_steps, seed=args.seed,
        num_train_epochs=1, shuffle_dataset=False, logging_steps=1,
        num_generations=args.num_responses, per_device_train_batch_size=args.num_responses,
        gradient_accumulation_steps=passes, steps_per_generation=passes,  # trap: more is off-policy
        loss_type="grpo", beta=args.kl_weight, use_bias_correction_kl=False, epsilon=0.2,
        learning_rate=args.learning_rate, lr_scheduler_type=args.schedule, warmup_steps=0.05,
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, adam_beta2=0.95, gradient_checkpointing=False,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), save_total_limit=1)

def parse_args():
    parser = sampling.stage_parser(__doc__)
    parser.set_defaults(run="runs/trl", skip_unreadable=False)
    parser.add_argument("--method", default="leaf", choices=["leaf", "grpo", "td", "tempo"],
                        help="as in 05")
    for flag in ("--raw-prompt", "--gradient-checkpointing"):
        parser.add_argument(flag, action="store_true", help="as in 01 and 05")
    for name, value in PAPER.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value,
                            help=HELP.get(name, "as in 01 to 05"))
    if os.path.realpath(parser.parse_known_args()[0].model).endswith("tests/demo/model"):
        parser.set_defaults(**DEMO)
    return parser.parse_args()

if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":
        sampling.run_stage(main, parse_args)
    else:  # run_stage would find the folder locked, by process 0
        main(parse_args())
