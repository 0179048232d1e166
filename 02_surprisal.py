"""Stage 2: how surprised was the model by each of its own tokens?

Surprisal is -log pi_old(token | prompt, tokens before): near 0 where the model had no choice, high
where it decided. Stage 3 looks for the forks there. Sampling took temperature 1.0 and top-p 0.9;
surprisal is that of the full softmax at temperature 1 (step 1).

The K responses share their prompt, most of it audio, and often their beginnings. Laid out as a
trie, each shared beginning once, they need one row in which a token sees the prompt and its own
ancestors. The result is that of K separate passes.

Reads   RUN/rollouts.pt, the model, RUN/adapter if there
Writes  RUN/surprisal.pt, per prompt, each (K, T) float32 in nats, 0 at padding: logp_old under the
        policy that sampled; logp_ref under the reference, the same model with its LoRA switched
        off; surprisal = -logp_old
Run     python 02_surprisal.py                                   demo, 2 cores: about 5 s
"""
from importlib import import_module

sampling = import_module("01_sample")

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

def build_trie(responses, lengths):
    """Lay K responses out as a trie in which a shared beginning stands once, parents first.

    responses (K, T) and lengths (K,) int64 -> tokens (M,), parents (M,) with -1 for the prompt,
    depths (M,) counted from 0, and node (K, T): the trie index of every token, 0 at padding.

    >>> tokens, parents, depths, node = build_trie(
    ...     torch.tensor([[5, 6, 7], [5, 6, 8], [9, 0, 0]]), torch.tensor([3, 3, 1]))
    >>> tokens.tolist(), parents.tolist(), depths.tolist()
    ([5, 6, 7, 8, 9], [-1, 0, 1, 1, -1], [0, 1, 2, 2, 0])
    >>> node.tolist()
    [[0, 1, 2], [0, 1, 3], [4, 0, 0]]
    """
    index, depths, node = {}, [], []  # index: (parent, token) -> number, by first appearance
    for row, length in zip(responses.tolist(), lengths.tolist()):
        path = []
        for t in range(length):
            key = (path[-1] if path else -1, row[t])
            if key not in index:
                index[key] = len(index)
                depths.append(t)
            path.append(index[key])
        node.append(path + [0] * (len(row) - length))
    parents, tokens = torch.tensor(list(index)).T
    return tokens, parents, torch.tensor(depths), torch.tensor(node)

def trie_mask(parents, P):
    """(P + M, P + M) bool, True where the row's position sees the column's: the prompt is causal;
    a trie token sees the prompt, its ancestors and itself."""
    mask = torch.eye(P + len(parents), dtype=torch.bool)
    mask[:P, :P] = torch.ones(P, P).tril()
    for m, parent in enumerate(parents.tolist()):
        mask[P + m] |= mask[P + parent]  # what the parent sees; -1 is the end of the prompt
    return mask

def mixed_precision(weight):
    """Autocast to bfloat16 if the model's weights are bfloat16. Our LoRA's stay float32, lest small
    steps be rounded away, but compute in bfloat16, which halves what is kept for the gradient."""
    half = torch.bfloat16
    return torch.autocast(weight.device.type, half, enabled=weight.dtype == half)

def batch_logps(model, embeds, tries):
    """Log-probability, in nats, of each trie token given its ancestors: a list of (M_i,) float32.

    embeds: list of (P_i, D); tries: list of (tokens, parents, depths), each (M_i,), as build_trie
    makes them. One forward pass, a row a prompt, padded at the end, with gradients where they are
    enabled; equal to K separate passes per prompt up to rounding.
    """
    embed, rows, positions = model.get_input_embeddings(), [], []
    device = embed.weight.device  # subtle: not model.device, the audio tower's, which stays behind
    L = max(len(heard) + len(tokens) for heard, (tokens, _, _) in zip(embeds, tries))
    mask = torch.eye(L, dtype=torch.bool).repeat(len(embeds), 1, 1)  # padding sees itself: no NaN
    for heard, sees, (tokens, parents, depths) in zip(embeds, mask, tries):
        P, end = len(heard), len(heard) + len(tokens)
        rows.append(torch.cat([heard.to(device, embed.weight.dtype), embed(tokens.to(device))]))
        positions.append(torch.cat([torch.arange(P), P + depths]))
        sees[:end, :end] = trie_mask(parents, P)
    with mixed_precision(embed.weight):
        hidden = model.get_decoder()(
            inputs_embeds=pad_sequence(rows, batch_first=True),
            attention_mask=mask[:, None].to(device), use_cache=False,
            position_ids=pad_sequence(positions, batch_first=True).to(device)
        ).last_hidden_state  # (N, L, D)
    # A token is predicted where its parent stands; parent -1 is the last position of the prompt.
    states = [row[len(heard) + parents.to(device)]
              for row, heard, (_, parents, _) in zip(hidden, embeds, tries)]
    tokens = torch.cat([tokens for tokens, _, _ in tries]).to(device)
    logps = -F.cross_entropy(sampling.logits_of(model, torch.cat(states)), tokens, reduction="none")
    return logps.split([len(state) for state in states])

def trie_logps(model, embeds, tokens, parents, depths):
    """batch_logps of a single prompt: embeds (P, D); tokens, parents, depths (M,) -> (M,)."""
    return batch_logps(model, [embeds], [(tokens, parents, depths)])[0]

def response_mask(prompt):
    """(K, T) bool, True at the tokens of the responses, their EOS included."""
    return torch.arange(prompt["responses"].shape[1]) < prompt["lengths"][:, None]

def score_responses(model, prompts):
    """Log-probabilities of some prompts' responses, in one pass: a list of (K, T), 0 at padding."""
    tries = [build_trie(prompt["responses"], prompt["lengths"]) for prompt in prompts]
    logps = batch_logps(model, [prompt["embeds"] for prompt in prompts], [t[:3] for t in tries])
    return [logp.cpu()[node].masked_fill(~response_mask(prompt), 0.0)
            for logp, (*_, node), prompt in zip(logps, tries, prompts)]

def parse_args():
    return sampling.stage_parser(__doc__, on_cpu=2, on_gpu=4).parse_args()

@torch.inference_mode()
def main(args):
    # 1. The responses, and the policy that sampled them.
    rollouts = sampling.load_stage(args.run, "rollouts")
    meta, adapter = rollouts["meta"], sampling.read_state(args.run, rollouts["meta"])["adapter"]
    model, _ = sampling.load_model(meta["model"], adapter, args.device, hear=False)

    # 2. One pass over each prompt's trie; once there is a LoRA, a second one without it.
    prompts, batches = [], sampling.chunks(rollouts["prompts"], args.prompts_per_batch)
    for batch in tqdm(batches, desc="scoring", unit="batch"):
        logp_old = logp_ref = score_responses(model, batch)
        if adapter:
            with model.disable_adapter():
                logp_ref = score_responses(model, batch)
        if not all(logp.isfinite().all() for logp in logp_old + logp_ref):
            raise sampling.BadInput(f"{meta['model']} gives log-probabilities that are no numbers: "
                                    "its weights, or the adapter's, are broken")
        prompts += [{"logp_old": old, "logp_ref": ref, "surprisal": -old}
                    for old, ref in zip(logp_old, logp_ref)]

    # 3. Write.
    sampling.save_stage(args.run, "surprisal", meta, prompts)

    # 4. Show: the first prompt's responses, one character a token.
    total = sum(prompt["lengths"].sum().item() for prompt in rollouts["prompts"])
    mean = sum(scored["surprisal"].sum().item() for scored in prompts) / total
    print(f"\n{total} tokens, mean surprisal {mean:.2f} nats -> {args.run}/surprisal.pt\n"
          "  . below 0.1   - below 0.5   + below 1.5   # above")
    first, steps = rollouts["prompts"][0], torch.tensor([0.1, 0.5, 1.5])
    for nats, length, text in zip(prompts[0]["surprisal"], first["lengths"], first["texts"]):
        marks = "".join(".-+#"[level] for level in torch.bucketize(nats[:length], steps))
        print(f"  {marks} {text}")

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
