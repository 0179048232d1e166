"""Is the loss of step 8 that of a plain loop, with the gradients worked by hand? And the learning rate?"""
import csv
import math
import shutil
from importlib import import_module

import pytest
import torch
from conftest import MODEL, call, load, padded, parsed

scoring = import_module("02_surprisal")
training = import_module("05_train")

CLIP, KL = 0.2, 0.02


def plain_loss(logp, logp_old, logp_ref, advantages, lengths, clip_eps, kl_weight):
    """Step 8 as a loop over Python floats."""
    total = 0.0
    for i, length in enumerate(lengths):
        response = 0.0
        for t in range(length):
            rho = math.exp(logp[i][t] - logp_old[i][t])
            bounded = min(max(rho, 1 - clip_eps), 1 + clip_eps)
            apart = logp_ref[i][t] - logp[i][t]
            response -= min(rho * advantages[i][t], bounded * advantages[i][t])
            response += kl_weight * (math.exp(apart) - apart - 1)
        total += response / length
    return total / len(lengths)


def random_batch(K=5, T=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logp, logp_old, logp_ref = -3 * torch.rand(3, K, T, generator=generator)
    advantages = torch.randn(K, T, generator=generator)
    lengths = torch.randint(1, T + 1, (K,), generator=generator)
    return logp, logp_old, logp_ref, advantages, torch.arange(T) < lengths[:, None]


def one_token(ratio, advantage, kl_weight=0.0, reference=None):
    """Loss and its gradient with respect to logp for a single token."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    logp_ref = logp.detach() if reference is None else torch.tensor([[reference]])
    loss = training.policy_loss(logp, torch.zeros(1, 1), logp_ref, torch.tensor([[advantage]]),
                                torch.ones(1, 1, dtype=torch.bool), CLIP, kl_weight)
    loss.backward()
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("clip_eps, kl_weight", [(0.2, 0.02), (0.05, 1.0), (0.2, 0.0)])
def test_loss_equals_a_plain_loop(seed, clip_eps, kl_weight):
    *tensors, mask = random_batch(seed=seed)
    wanted = plain_loss(*(tensor.tolist() for tensor in tensors), mask.sum(dim=1).tolist(),
                        clip_eps, kl_weight)
    assert training.policy_loss(*tensors, mask, clip_eps, kl_weight).item() == pytest.approx(wanted, rel=1e-5)


def test_gradient_at_ratio_one_is_the_advantage():
    logp, _, _, advantages, mask = random_batch()
    logp.requires_grad_()
    training.policy_loss(logp, logp.detach(), logp.detach(), advantages, mask, CLIP, KL).backward()
    wanted = -advantages * mask / mask.sum(dim=1, keepdim=True) / len(mask)
    torch.testing.assert_close(logp.grad, wanted)


@pytest.mark.parametrize("ratio, advantage, gradient", [
    (1.3, 2.0, 0.0),       # already more likely than the clip allows: enough
    (1.3, -2.0, 2.6),      # pushed the wrong way: -A rho
    (0.7, -2.0, 0.0),      # already less likely
    (0.7, 2.0, -1.4),
    (1.1, 2.0, -2.2),      # inside
    (0.9, -2.0, 1.8),
])
def test_clipping_stops_the_gradient_on_the_right_side_only(ratio, advantage, gradient):
    assert one_token(ratio, advantage)[1] == pytest.approx(gradient, abs=1e-6)


def test_clipped_values():
    assert one_token(1.3, 2.0)[0] == pytest.approx(-2.4)   # 1.2 * 2
    assert one_token(1.3, -2.0)[0] == pytest.approx(2.6)   # the worse of 1.3 and 1.2
    assert one_token(0.7, -2.0)[0] == pytest.approx(1.6)   # the worse of 0.7 and 0.8


def test_padding_plays_no_part():
    *tensors, mask = random_batch(seed=3)
    clean = training.policy_loss(*tensors, mask, CLIP, KL)
    garbage = [tensor.masked_fill(~mask, value) for tensor, value in zip(tensors, (-9.0, 4.0, 7.0, -50.0))]
    garbage[0].requires_grad_()
    loss = training.policy_loss(*garbage, mask, CLIP, KL)
    loss.backward()
    assert loss.item() == pytest.approx(clean.item(), rel=1e-6)
    assert garbage[0].grad[~mask].eq(0).all() and garbage[0].grad[mask].ne(0).any()


def test_the_last_token_counts():
    """EOS is a token like any other: its advantage moves the loss and the length counts it."""
    advantages, lengths = padded([[0.0, 0.0, 6.0], [0.0, 3.0]], fill=0.0)
    mask, zeros = torch.arange(3) < lengths[:, None], torch.zeros(2, 3)
    loss = training.policy_loss(zeros, zeros, zeros, advantages, mask, CLIP, KL)
    assert loss.item() == pytest.approx(-(6 / 3 + 3 / 2) / 2)


def test_kl_is_zero_and_flat_at_the_reference():
    assert one_token(1.0, 0.0, kl_weight=1.0) == (0.0, 0.0)


@pytest.mark.parametrize("reference", [-2.0, -0.1, 0.3, 1.5])
def test_kl_is_positive_and_pulls_towards_the_reference(reference):
    loss, gradient = one_token(1.0, 0.0, kl_weight=1.0, reference=reference)
    assert loss == pytest.approx(math.exp(reference) - reference - 1, rel=1e-5) and loss > 0
    assert gradient == pytest.approx(1 - math.exp(reference), rel=1e-5)  # below the reference: upwards


# The step that 05 takes.

@pytest.fixture
def step_of(tmp_path, rounds, monkeypatch):
    """Runs 05 on the second of two rounds; the gradients that its first step used, and its CSV rows."""
    def run_05(*options):
        run, seen, step = shutil.copytree(rounds.ready, tmp_path / "run"), [], torch.optim.AdamW.step

        def spied(optimizer, *rest):
            seen.append([weight.grad.clone() for weight in optimizer.param_groups[0]["params"]])
            return step(optimizer, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", spied)
            call("05_train.py", "--run", run, *options)
        with open(run / "train.csv", newline="") as file:
            return seen[0], list(csv.DictReader(file))[1:]
    return run_05


@pytest.mark.parametrize("method, per_batch, checkpoints", [
    ("leaf", 1, "--no-gradient-checkpointing"), ("leaf", 2, "--gradient-checkpointing"),
    ("grpo", 2, "--no-gradient-checkpointing"), ("td", 2, "--no-gradient-checkpointing")])
def test_a_step_follows_the_loss_of_all_its_prompts(rounds, step_of, method, per_batch, checkpoints):
    """Every response's mean over all of its tokens, every prompt's mean over its responses, the mean
    of the prompts; the ratio is 1, so that nothing is clipped; reference and policy differ."""
    found, _ = step_of("--method", method, "--kl-weight", 0.5, "--max-grad-norm", 0,
                       "--prompts-per-batch", per_batch, checkpoints)
    policy = training.load_policy({"model": str(MODEL)}, rounds.ready / "adapter", parsed("05_train.py"))
    stages = [load(rounds.ready, name)["prompts"] for name in ("rollouts", "surprisal", "advantages")]
    for prompt, score, earned in zip(*stages):
        trie = scoring.build_trie(prompt["responses"], prompt["lengths"])
        [trie_logps] = scoring.batch_logps(policy, [prompt["embeds"]], [trie])
        logp = trie_logps[trie.node]
        for i, length in enumerate(prompt["lengths"].tolist()):
            now, reference = logp[i, :length], score["logp_ref"][i, :length]
            gain = (now - now.detach()).exp() * earned[method][i, :length]
            kl = (reference - now).exp() - (reference - now) - 1
            ((0.5 * kl - gain).mean() / len(logp) / len(stages[0])).backward(retain_graph=True)
    wanted = [weight.grad for weight in policy.parameters() if weight.requires_grad]
    assert len(found) == len(wanted)
    for gradient, expected in zip(found, wanted):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


def test_long_gradients_are_cut(step_of):
    gradients, [row] = step_of("--max-grad-norm", 0.001)
    assert torch.cat([g.flatten() for g in gradients]).norm().item() == pytest.approx(0.001, rel=1e-3)
    assert float(row["grad_norm"]) > 0.001  # the table tells the length before


def test_learning_rate_is_constant_without_an_end():
    assert [training.learning_rate(step, 0, 3e-4) for step in (0, 7, 10_000)] == [3e-4] * 3


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    # 5% of 100 steps: 1/5, 2/5 ... 5/5 of the peak, then a cosine from the peak to a tenth of it.
    rates = [training.learning_rate(step, 100, 1.0) for step in range(101)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[5:], rates[6:]))
    assert all(rates[5 + k] + rates[100 - k] == pytest.approx(1.1) for k in range(48))
    assert training.learning_rate(250, 100, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_learning_rate_of_very_short_trainings(total):
    rates = [training.learning_rate(step, total, 1.0) for step in range(total + 1)]
    assert all(0.1 - 1e-9 <= rate <= 1.0 for rate in rates) and max(rates) == 1.0
