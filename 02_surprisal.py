"""02: how surprised was the model by each of its own tokens?

The surprisal of a token is -log p(token | prompt, tokens before it), under the policy that sampled
it (step 1 of the README): near 0 nats for a matter of course, high where an unlikely token was
drawn. 03 looks there for the places where responses fork. p is the full softmax at temperature 1,
although 01 samples from a top-p nucleus of 0.9, and perhaps at another temperature.

The K responses share their prompt, most of it audio, and often their first tokens. Laid out as a
trie, in which a shared prefix stands once, they take one row per prompt: a mask shows a token the
prompt and its own ancestors. The log-probabilities are those of K separate passes, up to rounding.
The trie is not LEAF's tree (03): it has every token, and makes things fast.

Sizes   K responses, T tokens in the longest, P prompt positions, M trie tokens, H hidden
Reads   RUN/rollouts.pt, the model, RUN/adapter if there
Writes  RUN/surprisal.pt, per prompt, each (K, T) float32 in nats, 0 at padding: logp_old, under the
        policy that sampled; logp_ref, under the model without its LoRA; surprisal = -logp_old
Run     python 02_surprisal.py                                   demo, 2 cores: about 5 s
Differs from the paper: nothing. The trie is a faster way to the same numbers.
"""
from collections import namedtuple
from importlib import import_module

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sampling = import_module("01_sample")

@torch.inference_mode()
def main(args):
    # Read the responses, and load the policy that sampled them.
    rollouts = sampling.load_stage(args.run, "rollouts")
    adapter = sampling.read_state(args.run, rollouts)["adapter"]
    model, _ = sampling.load_model(rollouts["meta"]["model"], adapter, args.device, audio=False)
    most_varied = max(rollouts["prompts"], key=lambda rollout: len(set(rollout["texts"])))
    check_trie(model, most_varied)

    # Score: one pass over each prompt's trie; once there is a LoRA, a second one without it.
    scores = []
    batches = sampling.chunks(rollouts["prompts"], args.prompts_per_batch)
    for batch in tqdm(batches, desc="scoring", unit="batch"):
        logp_old = score_responses(model, batch)
        logp_ref = logp_old
        if adapter:
            with model.disable_adapter():
                logp_ref = score_responses(model, batch)
        for old, ref in zip(logp_old, logp_ref):
            scores.append({"logp_old": old, "logp_ref": ref, "surprisal": -old})

    # Write.
    sampling.save_stage(args.run, "surprisal", rollouts["meta"], scores)

    # Show the first prompt's responses, a character per token.
    num_tokens = sum(rollout["lengths"].sum().item() for rollout in rollouts["prompts"])
    mean = sum(score["surprisal"].sum().item() for score in scores) / num_tokens
    print(f"\n{num_tokens} tokens, mean surprisal {mean:.2f} nats -> {args.run}/surprisal.pt\n"
          "A character per token:   . below 0.1   - below 0.5   + below 1.5   # above")
    first = rollouts["prompts"][0]
    levels = torch.bucketize(scores[0]["surprisal"], torch.tensor([0.1, 0.5, 1.5]))  # (K, T)
    for row, length, text in zip(levels.tolist(), first["lengths"].tolist(), first["texts"]):
        print("  " + "".join(".-+#"[level] for level in row[:length]), sampling.printable(text))

Trie = namedtuple("Trie", "tokens parents depths node")

def build_trie(responses, lengths):
    """Lay K responses out as a Trie, in which a shared prefix stands once, parents first.

    responses (K, T) and lengths (K,) int64 -> tokens (M,), parents (M,) with -1 for the prompt,
    depths (M,) counted from 0, and node (K, T): the place of each token in the trie, 0 at padding.

    >>> tokens, parents, depths, node = build_trie(
    ...     torch.tensor([[5, 6, 7], [5, 6, 8], [9, 0, 0]]), torch.tensor([3, 3, 1]))
    >>> tokens.tolist(), parents.tolist(), depths.tolist()
    ([5, 6, 7, 8, 9], [-1, 0, 1, 1, -1], [0, 1, 2, 2, 0])
    >>> node.tolist()
    [[0, 1, 2], [0, 1, 3], [4, 0, 0]]
    """
    index = {}  # (parent, token) -> where it is in the trie
    tokens = []
    parents = []
    depths = []
    node = torch.zeros_like(responses)
    for k, length in enumerate(lengths.tolist()):
        path = [-1]
        for t, token in enumerate(responses[k, :length].tolist()):
            key = (path[-1], token)
            if key not in index:
                index[key] = len(index)
                tokens.append(token)
                parents.append(path[-1])
                depths.append(t)
            path.append(index[key])
        node[k, :length] = torch.tensor(path[1:])
    return Trie(torch.tensor(tokens), torch.tensor(parents), torch.tensor(depths), node)

def trie_mask(parents, P):
    """(P + M, P + M) bool, True where the position of the row sees that of the column: the prompt
    is causal; a trie token sees the prompt, its ancestors and itself."""
    mask = torch.eye(P + len(parents), dtype=torch.bool)
    mask[:P, :P] = torch.ones(P, P).tril()
    for m, parent in enumerate(parents.tolist()):
        mask[P + m] |= mask[P + parent]  # what the parent sees; -1 is the end of the prompt
    return mask

def batch_logps(model, embeds, tries):
    """Log-probability, in nats, of each trie token given its ancestors: a list of (M_i,) float32.
    embeds: list of (P_i, H); tries: list of Tries. One forward pass, a row per prompt, padded at
    the end. Gradients flow where they are enabled. Equal to K separate passes up to rounding."""
    embed = model.get_input_embeddings()
    device = embed.weight.device  # subtle: model.device is the audio encoder's, which stays behind
    L = max(len(prompt) + len(trie.tokens) for prompt, trie in zip(embeds, tries))
    mask = torch.eye(L, dtype=torch.bool).repeat(len(tries), 1, 1)  # padding sees itself: no NaN
    rows = []
    positions = []
    for prompt, trie, row_mask in zip(embeds, tries, mask):
        P = len(prompt)
        size = P + len(trie.tokens)
        row_mask[:size, :size] = trie_mask(trie.parents, P)  # row_mask is a view of mask
        positions.append(torch.cat([torch.arange(P), P + trie.depths]))
        tokens = embed(trie.tokens.to(device))
        rows.append(torch.cat([prompt.to(device, tokens.dtype), tokens]))
    # On a GPU weights are in bfloat16; our LoRA stays in float32, but computes in bfloat16.
    is_bfloat16 = embed.weight.dtype == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
        hidden = model.get_decoder()(
            inputs_embeds=pad_sequence(rows, batch_first=True),
            position_ids=pad_sequence(positions, batch_first=True).to(device),
            attention_mask=mask[:, None].to(device), use_cache=False).last_hidden_state  # (N, L, H)
    # A token is predicted at its parent's position; parent -1 is the last position of the prompt.
    states = [row[len(prompt) + trie.parents.to(device)]
              for row, prompt, trie in zip(hidden, embeds, tries)]
    logits = sampling.logits_of(model, torch.cat(states))
    tokens = torch.cat([trie.tokens for trie in tries]).to(device)
    logps = -F.cross_entropy(logits, tokens, reduction="none")
    return logps.split([len(trie.tokens) for trie in tries])

def score_responses(model, rollouts):
    """Log-probabilities of a few prompts' responses in one pass: a list of (K, T), 0 at padding."""
    tries = [build_trie(rollout["responses"], rollout["lengths"]) for rollout in rollouts]
    logps = batch_logps(model, [rollout["embeds"] for rollout in rollouts], tries)
    return [logp.cpu()[trie.node].masked_fill(~response_mask(rollout), 0.0)
            for logp, trie, rollout in zip(logps, tries, rollouts)]

def response_mask(rollout):
    """(K, T) bool, True at the tokens of the responses, their EOS included."""
    return torch.arange(rollout["responses"].shape[1]) < rollout["lengths"][:, None]

def check_trie(model, rollout):
    """UserError if the responses of a rollout score otherwise in their trie than each alone: then
    the branches see each other, as in a recurrent model."""
    together = score_responses(model, [rollout])[0]
    gap = 0.0
    for k in range(len(together)):
        alone = {**rollout, "responses": rollout["responses"][k:k + 1],
                 "lengths": rollout["lengths"][k:k + 1]}
        gap += (score_responses(model, [alone])[0] - together[k]).abs().sum().item()
    gap /= rollout["lengths"].sum().item()  # nats per token
    if not gap < 0.1:  # right models: 0 in float32, 1e-3 in bfloat16; recurrent ones: 0.8
        raise sampling.UserError("the branches of a trie see each other in this model, or its "
                                 f"weights are broken: responses score {gap:.3f} nats off")

def parse_args():
    return sampling.stage_parser(__doc__, prompts_per_batch=2).parse_args()

if __name__ == "__main__":
    sampling.run_stage(main, parse_args)
