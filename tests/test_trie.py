"""Is one pass over a trie equal to one pass per response? And is the trie laid out right?"""
import random
from importlib import import_module

import pytest
import torch
from conftest import MODEL, padded, parsed

scoring = import_module("02_surprisal")
training = import_module("05_train")

RAGGED = [[7, 8, 9, 10, 2], [7, 8, 9, 11, 12, 2], [7, 8, 2], [7, 30, 31], [2], [40, 8, 9, 10, 2]]
SHAPES = {"mixed": RAGGED, "identical": [[7, 8, 9, 2]] * 4, "one": [[7, 8, 9, 10, 11]],
          "one token": [[2]], "prefix of another": [[7, 8], [7, 8, 9], [7]],
          "nothing shared": [[n, n + 1, n + 2] for n in (10, 20, 30)]}


def random_responses(seed):
    """K responses over two tokens, so that many beginnings are shared."""
    draw = random.Random(seed)
    return [[draw.choice([3, 0]) for _ in range(draw.randint(1, 7))] for _ in range(draw.randint(1, 9))]


def apart(model, embeds, responses, lengths):
    """(K, T) log-probabilities from a whole pass of the model over each response, 0 at padding."""
    rows = torch.zeros(responses.shape)
    for i, length in enumerate(lengths.tolist()):
        tokens = responses[i, :length]
        inputs = torch.cat([embeds, model.get_input_embeddings()(tokens)])[None]
        logits = model(inputs_embeds=inputs).logits[0, len(embeds) - 1:-1]
        logp = logits.double().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        rows = rows.index_put((torch.tensor(i), torch.arange(length)), logp.float())
    return rows


def together(model, embeds, responses, lengths):
    """The same from one pass over the trie."""
    return scoring.score_responses(
        model, [{"embeds": embeds, "responses": responses, "lengths": lengths}])[0]


@pytest.fixture(scope="module")
def policy():
    """The demo with a LoRA that changes it."""
    model = training.load_policy({"model": str(MODEL)}, None, parsed("05_train.py", "--device", "cpu"))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


@pytest.mark.parametrize("seed", range(30))
def test_every_response_is_a_path_and_shared_beginnings_stand_once(seed):
    rows = random_responses(seed)
    responses, lengths = padded(rows)
    tokens, parents, depths, node = scoring.build_trie(responses, lengths)
    beginnings = {tuple(row[:t + 1]) for row in rows for t in range(len(row))}
    assert len(tokens) == len(parents) == len(depths) == len(beginnings)
    assert all(parent < child for child, parent in enumerate(parents.tolist()))
    assert node.shape == responses.shape and node.dtype == torch.int64
    for i, row in enumerate(rows):
        place, path = int(node[i, len(row) - 1]), []
        while place != -1:
            assert int(node[i, int(depths[place])]) == place
            path.append(int(tokens[place]))
            place = int(parents[place])
        assert path[::-1] == row


def test_mask_by_hand():
    #            4 -> 5 -> 6
    # prompt  <     `-> 7
    #            8
    tokens, parents, depths, _ = scoring.build_trie(*padded([[4, 5, 6], [4, 7], [8]]))
    assert scoring.trie_mask(parents, P=2).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_separate_passes(policy, prompt_embeds, shape):
    responses, lengths = padded(SHAPES[shape])
    weights = torch.randn(responses.shape, generator=torch.Generator().manual_seed(1))
    found, gradients = [], []
    for score in (apart, together):
        policy.zero_grad()
        logp = score(policy, prompt_embeds[1], responses, lengths)
        (logp * weights).sum().backward()
        found.append(logp.detach())
        gradients.append({name: weight.grad.clone() for name, weight in policy.named_parameters()
                          if weight.requires_grad})
    policy.zero_grad()
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=0)
    assert len(gradients[0]) == 4 * 7 * 2  # layers, projections, A and B
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_prompts_of_one_batch_do_not_touch_each_other(policy, prompt_embeds):
    """Rows of different lengths, values and gradients: as one by one."""
    prompts = []
    for embeds, shape in zip(prompt_embeds, ("mixed", "one token", "nothing shared", "identical")):
        responses, lengths = padded(SHAPES[shape])
        prompts.append({"embeds": embeds, "responses": responses, "lengths": lengths})
    found, gradients = [], []
    masks = []
    hook = policy.get_decoder().register_forward_pre_hook(
        lambda part, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    for batches in ([prompts], [[prompt] for prompt in prompts]):
        policy.zero_grad()
        logps = [logp for batch in batches for logp in scoring.score_responses(policy, batch)]
        sum(logp.square().sum() for logp in logps).backward()
        found.append([logp.detach() for logp in logps])
        gradients.append({name: weight.grad.clone() for name, weight in policy.named_parameters()
                          if weight.requires_grad})
    policy.zero_grad()
    hook.remove()
    assert masks[0].shape[0] == 4 and all(mask.any(dim=-1).all() for mask in masks)  # or a GPU says NaN
    for logp, alone, prompt in zip(*found, prompts, strict=True):
        torch.testing.assert_close(logp, alone, atol=1e-4, rtol=0)
        wanted = apart(policy, prompt["embeds"], prompt["responses"], prompt["lengths"]).detach()
        torch.testing.assert_close(logp, wanted, atol=1e-4, rtol=0)
    for name, gradient in gradients[1].items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-3, rtol=1e-3, msg=name)
