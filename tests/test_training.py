"""Updates of 05 worked by hand, with a policy whose log-probabilities are its weights."""
import csv
import math
import shutil
from importlib import import_module

import pytest
import torch
from conftest import call, load, parsed

sampling = import_module("01_sample")
training = import_module("05_train")

# Two responses of 3 and 2 tokens; what stands in the sixth place is padding, and plays no part.
RATIOS = torch.tensor([[1.3, 1.1, 0.7], [0.9, 1.0, 9.0]])  # policy / the policy that sampled
FROM_REFERENCE = torch.tensor([[0.5, 0.0, -1.0], [0.2, 0.0, 7.0]])  # logp_ref - logp
ADVANTAGES = torch.tensor([[2.0, 2.0, 2.0], [-1.0, -1.0, 0.0]])
LOGP = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.1, -4.0]])


def rollout(place=0, rewards=(0.5, 0.2)):
    """All that 01 to 04 say of a prompt; `place` is where the policy has its log-probabilities."""
    return {"place": place, "responses": torch.tensor([[5, 6, 2], [7, 2, 0]]), "lengths": torch.tensor([3, 2]),
            "logp_old": LOGP - RATIOS.log(), "logp_ref": LOGP + FROM_REFERENCE, "leaf": ADVANTAGES,
            "grpo": -ADVANTAGES, "rewards": torch.tensor(rewards)}


@pytest.fixture
def update(monkeypatch):
    """Runs train_step on a few rollouts, `times` times, with options of 05; the policy, and the
    statistics of each update. The learning rate is 0: the policy stays as it is."""
    monkeypatch.setattr(training.scoring, "score_responses",
                        lambda policy, batch: [policy[rollout["place"]] for rollout in batch])

    def run(rollouts, *options, times=1):
        policy = torch.nn.ParameterList(torch.nn.Parameter(LOGP.clone()) for _ in rollouts)
        optimizer = training.load_optimizer(policy, None)
        optimizer.param_groups[0]["lr"] = 0.0
        args = parsed("05_train.py", "--max-grad-norm", 0, *options)
        return policy, [training.train_step(policy, optimizer, rollouts, args) for _ in range(times)]
    return run


@pytest.mark.parametrize("clip_eps, share", [(0.05, 4 / 5), (0.2, 2 / 5), (0.25, 2 / 5), (0.5, 0)])
def test_clipped_counts_tokens_on_both_sides(update, clip_eps, share):
    """1.3 and 0.7 are outside 1 ± 0.2; 1.1 and 0.9 are outside 1 ± 0.05, too."""
    _, [statistics] = update([rollout()], "--clip-eps", clip_eps)
    assert statistics["clipped"] == pytest.approx(share)


@pytest.mark.parametrize("clip_eps, gradient", [
    (0.05, [0.0, 0.0, -1.4 / 6, 0.0, 1.0 / 4]),
    (0.2, [0.0, -2.2 / 6, -1.4 / 6, 0.9 / 4, 1.0 / 4]),
    (0.5, [-2.6 / 6, -2.2 / 6, -1.4 / 6, 0.9 / 4, 1.0 / 4]),
])
def test_the_gradient_of_an_update_is_clipped_at_eps(update, clip_eps, gradient):
    """-A ratio, divided by the response's tokens and by 2 responses; 0 where the ratio has moved
    past 1 ± eps as the advantage favours."""
    _, [statistics] = update([rollout()], "--clip-eps", clip_eps, "--kl-weight", 0)
    assert statistics["grad_norm"] == pytest.approx(math.hypot(*gradient), rel=1e-5)


def test_kl_is_that_from_the_reference(update):
    """Not from the policy that sampled; a mean over the tokens, in nats: e^d - d - 1."""
    _, [statistics] = update([rollout()])
    apart = [0.5, 0.0, -1.0, 0.2, 0.0]
    assert statistics["kl"] == pytest.approx(sum(math.exp(d) - d - 1 for d in apart) / 5, rel=1e-5)


def test_the_statistics_are_of_all_prompts_of_an_update(update):
    """However many batches they take; in one of three prompts all rewards are equal."""
    rollouts = [rollout(0), rollout(1, (0.4, 0.4)), rollout(2, (1.0, 0.8))]
    rollouts[2] |= {"lengths": torch.tensor([1, 1]), "logp_old": LOGP, "logp_ref": LOGP}
    for per_batch in (1, 2, 3):
        _, [statistics] = update(rollouts, "--prompts-per-batch", per_batch)
        assert statistics["reward"] == pytest.approx(3.3 / 6) and statistics["alike"] == pytest.approx(1 / 3)
        assert statistics["length"] == pytest.approx(12 / 6)
        assert statistics["clipped"] == pytest.approx(4 / 12)


def test_each_update_has_its_own_gradient(update):
    """Of the same policy and prompts it is the same again: nothing is left of the one before."""
    policy, statistics = update([rollout(0), rollout(1)], times=3)
    norms = [row["grad_norm"] for row in statistics]
    assert norms[0] > 0.1 and norms == [norms[0]] * 3
    assert all(weight.grad is None or not weight.grad.any() for weight in policy)


def adam(weight, gradients, rate, beta1=0.9, beta2=0.95):
    """The weight after Adam's updates, by the formula of its paper; no weight decay."""
    first = second = 0.0
    for t, gradient in enumerate(gradients, start=1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient ** 2
        weight -= rate * (first / (1 - beta1 ** t)) / ((second / (1 - beta2 ** t)) ** 0.5 + 1e-8)
    return weight


@pytest.mark.parametrize("gradients", [[1.0, 3.0, -0.5], [0.0, 0.0, 0.0]])
def test_the_optimizer_is_adam_with_these_betas_and_without_weight_decay(gradients):
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 2.0)
    optimizer = training.load_optimizer(layer, None)
    optimizer.param_groups[0]["lr"] = 0.1
    for gradient in gradients:
        layer.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
    assert layer.weight.item() == pytest.approx(adam(2.0, gradients, 0.1), rel=1e-6)


def test_the_schedule_goes_on_from_round_to_round(tmp_path, rounds, monkeypatch):
    """The first round was one update; those of the second are numbers 1 and 2 of 4, counted from 0.
    After a warm-up of one: the peak, then a third of the way down the cosine."""
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    used = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: (
        used.append(optimizer.param_groups[0]["lr"]), step(optimizer)))
    call("05_train.py", "--run", run, "--total-steps", 4, "--prompts-per-step", 1, "--learning-rate", 1e-3)
    assert used == pytest.approx([1e-3, 1e-3 * (0.55 + 0.45 * 0.5)])


def test_each_round_has_draws_of_its_own(rounds, monkeypatch):
    """For a new LoRA, and for dropout; the same round has the same again."""
    seeds = []

    def stop(*_):
        seeds.append(torch.initial_seed())
        raise sampling.UserError("enough")

    monkeypatch.setattr(training, "load_policy", stop)
    for run in (rounds.sampled, rounds.sampled, rounds.ready):
        with pytest.raises(sampling.UserError, match="enough"):
            training.main(parsed("05_train.py", "--run", run))
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_round_learns_from_each_of_its_prompts(handmade, monkeypatch):
    """Of three prompts, two an update: the last update has one."""
    call("03_tree.py", "--run", handmade)
    call("04_advantage.py", "--run", handmade)
    starts = {rollout["id"]: score["logp_old"] - 0.5 for rollout, score in zip(
        load(handmade, "rollouts")["prompts"], load(handmade, "surprisal")["prompts"])}
    policy = torch.nn.ParameterDict({name: torch.nn.Parameter(start.clone()) for name, start in starts.items()})
    monkeypatch.setattr(training, "load_policy", lambda *_: policy)
    monkeypatch.setattr(training, "save_adapter", lambda *_: None)
    monkeypatch.setattr(training.scoring, "score_responses",
                        lambda policy, batch: [policy[rollout["id"]] for rollout in batch])
    training.main(parsed("05_train.py", "--run", handmade, "--prompts-per-step", 2))
    with open(handmade / "train.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]
    assert all(weights.ne(starts[name]).any() for name, weights in policy.items())
