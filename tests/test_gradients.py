"""Are the gradients of tests/gradients.py the stages' own? Is the true one that of the reward?"""
import csv
import shutil
from importlib import import_module

import pytest
import torch
from conftest import load, padded, parsed, refusal

import gradients

sampling = import_module("01_sample")
scoring = import_module("02_surprisal")
tree = import_module("03_tree")
advantage = import_module("04_advantage")
training = import_module("05_train")

FLAGS = {"leaf": [], "global": ["--advantage-terms", "global"], "local": ["--advantage-terms", "local"],
         "multiplicity 0": ["--multiplicity", 0]}


@pytest.fixture(scope="module")
def policy(rounds):
    """The demo with a new LoRA, as 05 makes it, and the LoRA's weights."""
    torch.manual_seed(0)
    meta = torch.load(rounds.sampled / "rollouts.pt", weights_only=True)["meta"]
    model = training.load_policy(meta, None, parsed("05_train.py"))
    return model, [weight for weight in model.parameters() if weight.requires_grad]


def credited(run, options=()):
    """The prompts of a run's files after 04 with these options, each as a dict of all its keys."""
    rewards = [prompt["rewards"].tolist() for prompt in load(run, "advantages")["prompts"]]
    with pytest.MonkeyPatch.context() as patch:
        iterator = iter(rewards)
        patch.setattr(advantage, "prompt_rewards", lambda rollout: next(iterator))
        advantage.main(parsed("04_advantage.py", "--run", run, *options))
    names = ("rollouts", "surprisal", "advantages")
    prompts = [{**a, **b, **c} for a, b, c in zip(*(load(run, name)["prompts"] for name in names))]
    for prompt, values in zip(prompts, rewards):
        prompt["rewards"] = values
    return prompts


def tokens_of(rollout):
    return [row[:length] for row, length in zip(rollout["responses"].tolist(), rollout["lengths"].tolist())]


def value(rollout, prefix):
    """The mean reward of the responses that begin with these tokens."""
    rewards = [reward for tokens, reward in zip(tokens_of(rollout), rollout["rewards"])
               if tokens[:len(prefix)] == prefix]
    return sum(rewards) / len(rewards)


def advantages_of(method, rollout):
    """(K, T), from 04's file where it has them; `sum` undoes the mean over tokens of 05's loss."""
    lengths = rollout["lengths"]
    mask = scoring.response_mask(rollout)
    rewards = torch.tensor(rollout["rewards"])
    if method == "no z-score":
        return advantage.spread(rollout["spans"], lengths)
    if method == "sum":
        return ((rewards - rewards.mean()) * lengths)[:, None] * mask
    if method == "grpo-std":
        return ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None] * mask
    if method in ("td", "tempo"):
        whole = torch.zeros(mask.shape) if method == "td" else rollout["grpo"].clone()
        for i, tokens in enumerate(tokens_of(rollout)):
            for t in range(len(tokens)):
                change = value(rollout, tokens[:t + 1]) - value(rollout, tokens[:t])
                whole[i, t] += change / max(rewards.std().item(), 1 / 3)
        return whole
    if method == "leaf-all":
        boundaries = [b for b in range(1, mask.shape[1]) if any(
            one[:b] == other[:b] and one[b:b + 1] != other[b:b + 1]
            for one in tokens_of(rollout) for other in tokens_of(rollout))]
        groups = [tree.group_prefixes(rollout["responses"], lengths, b) for b in boundaries]
        spans = advantage.span_advantages(boundaries, groups, lengths, rollout["rewards"])
        return advantage.spread(advantage.zscore(spans), lengths)
    return rollout["grpo" if method == "grpo" else "leaf"]


@pytest.fixture(scope="module")
def measured(rounds, policy, tmp_path_factory):
    """The gradients of all methods from each prompt."""
    run = shutil.copytree(rounds.sampled, tmp_path_factory.mktemp("measured") / "run")
    return [gradients.method_gradients(policy[0], rollout, policy[1], fork_budget=2)
            for rollout in credited(run)]


@pytest.mark.parametrize("method", gradients.METHODS)
def test_a_methods_gradient_is_that_of_05s_loss(rounds, policy, measured, method, tmp_path):
    model, weights = policy
    run = shutil.copytree(rounds.sampled, tmp_path / "run")
    for rollout, found in zip(credited(run, FLAGS.get(method, [])), measured, strict=True):
        [logp] = scoring.score_responses(model, [rollout])
        loss = training.policy_loss(logp, rollout["logp_old"], rollout["logp_ref"],
                                    advantages_of(method, rollout),
                                    scoring.response_mask(rollout), clip_eps=0.2, kl_weight=0.02)
        wanted = -torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        assert wanted.norm() > 0.01
        torch.testing.assert_close(found[gradients.METHODS.index(method)], wanted, atol=1e-5, rtol=1e-3)


def test_where_rewards_hardly_differ():
    """GRPO has a floor of 1/3 under the deviation, which is 0.01 here; `grpo-std` has none."""
    responses, lengths = padded([[5, 6, 2], [5, 2], [7, 2]])
    rollout = {"responses": responses, "lengths": lengths, "rewards": [0.51, 0.5, 0.49]}
    found = {method: gradients.token_advantages(method, rollout, fork_budget=2)[0].tolist()
             for method in ("grpo", "grpo-std", "td", "tempo")}
    assert found["grpo"] == pytest.approx([0.03] * 3, rel=1e-3)
    assert found["grpo-std"] == pytest.approx([0.01 / 0.0101] * 3, rel=1e-3)
    assert found["td"] == pytest.approx([0.015, 0.015, 0], abs=1e-6)
    assert found["tempo"] == pytest.approx([0.045, 0.045, 0.03], rel=1e-3)


def test_every_boundary():
    """Identical responses part nowhere; at 0 all are together."""
    responses, _ = padded([[5, 6, 7, 8, 2], [5, 6, 9, 8, 2], [5, 6, 7, 2], [5, 6, 7, 2], [4, 6, 3, 2]])
    assert gradients.every_boundary(responses) == [2, 3]
    assert gradients.every_boundary(responses[2:4]) == []


def expected_reward(model, embeds):
    """Of an answer of one token that is rewarded if it is even: known without sampling."""
    hidden = model.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state[0, -1]
    return sampling.logits_of(model, hidden).softmax(dim=-1)[::2].sum().item()


@torch.no_grad()
def slope(model, weights, embeds, direction, step=0.02):
    """How fast the expected reward grows in a direction, by finite differences."""
    before = torch.nn.utils.parameters_to_vector(weights)
    ends = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(before + sign * step * direction, weights)
        ends.append(expected_reward(model, embeds))
    torch.nn.utils.vector_to_parameters(before, weights)
    return (ends[0] - ends[1]) / (2 * step)


def test_true_gradient_is_that_of_the_expected_reward(policy, prompt_embeds):
    model, weights = policy
    embeds = prompt_embeds[0].clone()
    torch.manual_seed(0)
    groups = []
    for responses, lengths in sampling.sample_responses(model, [embeds] * 8, K=256, max_new_tokens=1,
                                                        temperature=1.0, top_p=1.0):
        groups.append({"embeds": embeds, "responses": responses.clone(), "lengths": lengths.clone(),
                       "rewards": (responses[:, 0] % 2 == 0).float().tolist()})
    gradient = gradients.true_gradient(model, groups, weights)
    steepest = gradient / gradient.norm()
    one_layer = torch.zeros_like(gradient)
    one_layer[:len(gradient) // 4] = steepest[:len(gradient) // 4]
    for direction in (steepest, one_layer / one_layer.norm()):
        assert direction @ gradient > 0.1
        assert slope(model, weights, embeds, direction) == pytest.approx((direction @ gradient).item(), rel=0.1)


def test_true_gradient_counts_every_token(policy, prompt_embeds):
    """Responses of several lengths, each in a row of its own instead of a trie."""
    model, weights = policy
    embeds = prompt_embeds[0].clone()
    responses, lengths = padded([[5, 6, 7, 2], [5, 2], [9, 2], [9, 6, 2]])
    rewards = [1.0, 0.25, 0.5, 0.0]
    total = 0
    for response, length, reward in zip(responses, lengths, rewards):
        tokens = response[:length]
        inputs = torch.cat([embeds, model.get_input_embeddings()(tokens)])
        hidden = model.get_decoder()(inputs_embeds=inputs[None]).last_hidden_state[0, -1 - length:-1]
        logp = sampling.logits_of(model, hidden).log_softmax(dim=-1).gather(1, tokens[:, None])
        total = total + (reward - 0.4375) * logp.sum() / 4
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(total, weights)])
    rollout = {"embeds": embeds, "responses": responses, "lengths": lengths, "rewards": rewards}
    halves = [{**rollout, "responses": responses[rows], "lengths": lengths[rows],
               "rewards": rewards[rows]} for rows in (slice(0, 2), slice(2, 4))]
    for groups in ([rollout], halves):
        torch.testing.assert_close(gradients.true_gradient(model, groups, weights), wanted, atol=1e-4, rtol=1e-3)


def test_cosines_of_the_true_gradient_with_itself(rounds, policy, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "METHODS", ["grpo", "leaf", "global", "sum"])
    first, second = credited(shutil.copytree(rounds.sampled, tmp_path / "run"))
    prompts = [[first] * 4, [second] * 4, [second] * 4, [first] * 4]
    columns = gradients.measure(*policy[:1], prompts, policy[1], fork_budget=2)
    for name in gradients.COSINES:
        cosines = dict(zip(gradients.METHODS, columns[name].tolist()))
        assert cosines["sum"] == pytest.approx(1, abs=1e-4)
        assert 0 < cosines["leaf"] < 0.999 and cosines["leaf"] != cosines["global"]
        gaps = columns[name] - columns[name][0]
        torch.testing.assert_close(columns[f"{name}_gap"], gaps, atol=1e-5, rtol=0)
        if name != "prompt_cosine":  # there are two prompts, but the groups of each are the same
            assert (columns[f"{name}_se"] < 1e-4).all() and (columns[f"{name}_gap_se"] < 1e-4).all()


def test_the_standard_error_is_that_of_the_difference(rounds, policy, tmp_path, monkeypatch):
    """Two rounds, so two differences to GRPO: their standard error is half of what lies between."""
    monkeypatch.setattr(gradients, "METHODS", ["grpo", "leaf"])
    model, weights = policy
    first, second = credited(shutil.copytree(rounds.sampled, tmp_path / "run"))
    columns = gradients.measure(model, [[first, second, first, second]] * 4, weights, fork_budget=2)
    true = gradients.true_gradient(model, [first, second], weights)
    differences = []
    for rollout in (first, second):
        each = gradients.method_gradients(model, rollout, weights, fork_budget=2)
        cosines = torch.cosine_similarity(each, true, dim=-1)
        differences.append(cosines - cosines[0])
    one, two = differences
    torch.testing.assert_close(columns["round_cosine_gap_se"], (one - two).abs() / 2, atol=1e-4, rtol=1e-3)


def test_the_command(rounds, tmp_path, capsys, monkeypatch):
    """On the untouched model that a run has sampled from, and on the one that it has trained."""
    monkeypatch.setattr(gradients, "METHODS", ["grpo", "leaf"])
    monkeypatch.setattr(gradients, "SAMPLING", {"max_new_tokens": 8, "temperature": 1.0})
    for options in (["--num-samples", 20], ["--num-samples", 16], ["--num-prompts", 6]):
        with pytest.raises(sampling.UserError, match=f"{options[0]} has to be a multiple"):
            gradients.main(parsed("gradients.py", "--run", tmp_path / "run", *options))
    options = ["--num-prompts", 4, "--num-samples", 8, "--num-responses", 2, "--reward", "exact",
               "--out", tmp_path / "new" / "table.csv"]
    assert "run 01_sample.py" in refusal("tests/gradients.py", "--run", tmp_path / "run", *options)
    for run, said in ((rounds.sampled, "no adapter"), (rounds.trained, "adapter, mean reward")):
        run = shutil.copytree(run, tmp_path / run.name)
        gradients.main(parsed("gradients.py", "--run", run, *options))
        assert said in capsys.readouterr().out
    rows = list(csv.DictReader(open(tmp_path / "new" / "table.csv", encoding="utf-8")))
    assert [row["method"] for row in rows] == gradients.METHODS
    for row in rows:
        assert all(-1 <= float(row[name]) <= 1 and float(row[f"{name}_se"]) >= 0 for name in gradients.COSINES)
