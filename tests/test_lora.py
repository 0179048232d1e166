"""Does the LoRA start as nothing, learn alone, and come back as it was saved?"""
import json
import shutil
from importlib import import_module

import pytest
import torch
from conftest import MODEL, call, load, padded, parsed
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

sampling = import_module("01_sample")
scoring = import_module("02_surprisal")
training = import_module("05_train")

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def policy_of(*options, adapter=None):
    return training.load_policy({"model": str(MODEL)}, adapter,
                                parsed("05_train.py", "--device", "cpu", *options))


def logits_on(model, embeds):
    with torch.no_grad():
        return sampling.logits_of(model, model.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state)


def weights_of(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_rank_and_scale_are_those_asked_for():
    policy = policy_of("--lora-rank", 3, "--lora-alpha", 12, "--lora-dropout", 0.25)
    layer = next(part for part in policy.modules() if hasattr(part, "lora_A"))
    assert layer.lora_A["default"].weight.shape[0] == 3 and layer.scaling["default"] == 4


def test_dropout_is_on_in_the_lora_and_nowhere_else():
    policy = policy_of("--lora-dropout", 0.25)
    dropouts = [part for part in policy.modules() if isinstance(part, torch.nn.Dropout)]
    assert [part.p for part in dropouts if part.training] == [0.25] * 4 * 7
    assert not any(part.training for name, part in policy.get_base_model().named_modules()
                   if "lora" not in name and not hasattr(part, "lora_dropout"))


def test_training_changes_the_weights_and_goes_on_from_them(rounds):
    first, second = weights_of(rounds.trained), weights_of(rounds.again)
    assert first.keys() == second.keys() and len(first) == 4 * 7 * 2
    assert all(first[name].ne(0).any() for name in first)      # B began as zeros
    assert all(first[name].ne(second[name]).any() for name in first)


def test_the_optimizer_goes_on(rounds):
    """Two prompts are one optimizer step a round."""
    for run, steps in ((rounds.trained, 1), (rounds.again, 2)):
        state = torch.load(run / "adapter" / "optimizer.pt", weights_only=True)["state"]
        assert len(state) == 4 * 7 * 2 and all(entry["step"] == steps for entry in state.values())
        assert json.loads((run / "adapter" / "training.json").read_text())["step"] == steps
    assert load(rounds.sampled, "rollouts")["meta"]["round"] == 1
    assert load(rounds.ready, "rollouts")["meta"]["round"] == 2


def test_training_begun_on_a_gpu_goes_on_on_a_cpu(rounds, tmp_path, monkeypatch):
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    state = torch.load(run / "adapter" / "optimizer.pt", weights_only=True)
    with monkeypatch.context() as patch:  # as if the tensors were on a GPU
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(state, run / "adapter" / "optimizer.pt")
    call("05_train.py", "--run", run, "--device", "cpu")
    assert {name: weight.tolist() for name, weight in weights_of(run).items()} == {
        name: weight.tolist() for name, weight in weights_of(rounds.again).items()}


def test_in_bfloat16_the_lora_learns_in_float32(prompt_embeds):
    """As on a GPU: its gradients are float32, and near those of a model in float32."""
    responses, lengths = padded([[5, 6, 7], [5, 6, 8], [9, 2, 0]])
    rollout = {"embeds": prompt_embeds[0], "responses": responses, "lengths": lengths}
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = policy_of()
        for name, weight in policy.named_parameters():
            weight.data = weight.data if "lora_" in name else weight.data.to(dtype)
            if "lora_" in name:
                std = 0.01 if "lora_B" in name else 0.05
                torch.nn.init.normal_(weight, std=std, generator=torch.Generator().manual_seed(len(name)))
        scoring.score_responses(policy, [rollout])[0].sum().backward()
        gradients.append({name: weight.grad for name, weight in policy.named_parameters()
                          if weight.requires_grad})
    for name, expected in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert (gradients[1][name] - expected).norm() < 0.1 * expected.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(prompt_embeds, dtype):
    """Dropout draws the same again when a layer is computed once more."""
    responses, lengths = padded([[5, 6, 7], [5, 6, 8], [9, 2, 0]])
    prompt, gradients, kept = {"embeds": prompt_embeds[0], "responses": responses, "lengths": lengths}, [], []
    for option in ("--no-gradient-checkpointing", "--gradient-checkpointing"):
        torch.manual_seed(0)
        policy, sizes = policy_of("--lora-dropout", 0.25, option), {}
        for name, weight in policy.named_parameters():
            weight.data = weight.data if "lora_" in name else weight.data.to(dtype)
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
                lambda t: t):
            [logp] = scoring.score_responses(policy, [prompt])
        logp.sum().backward()
        gradients.append([weight.grad for weight in policy.parameters() if weight.requires_grad])
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 4
    assert all(gradient.any() and torch.equal(gradient, again) for gradient, again in zip(*gradients))


def test_a_step_raises_what_earned_credit(rounds):
    """The new policy on the rollouts it learned from: log-probability went where the credit was."""
    policy, gain = policy_of(adapter=rounds.trained / "adapter"), 0.0
    stages = (load(rounds.sampled, name)["prompts"] for name in ("rollouts", "surprisal", "advantages"))
    for prompt, score, earned in zip(*stages):
        with torch.no_grad():
            [logp] = scoring.score_responses(policy, [prompt])
        moved = earned["leaf"] * (logp - score["logp_old"])  # no credit at padding
        gain += (moved.sum(dim=1) / prompt["lengths"]).mean().item()
    assert gain > 1e-3


def test_peft_loads_the_adapter_on_a_fresh_model(prompt_embeds, rounds):
    adapter = rounds.again / "adapter"
    fresh = AutoModelForMultimodalLM.from_pretrained(MODEL, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, str(adapter)).eval()
    ours, _ = sampling.load_model(str(MODEL), adapter)
    with torch.no_grad():
        logits = theirs(inputs_embeds=prompt_embeds[0][None]).logits
    torch.testing.assert_close(logits, logits_on(ours, prompt_embeds[0]), atol=1e-5, rtol=0)
    base, _ = sampling.load_model(str(MODEL))
    assert not torch.allclose(logits, logits_on(base, prompt_embeds[0]), atol=1e-3)


def test_an_adapter_is_read_on_the_cpu(rounds, monkeypatch):
    """PEFT, if not told, would put it on the first GPU, which may be full or not the one asked for."""
    def first_gpu():
        raise AssertionError("PEFT chooses the device")

    monkeypatch.setattr("peft.peft_model.infer_device", first_gpu)
    assert sampling.load_model(str(MODEL), rounds.again / "adapter")[0].peft_config


def test_an_adapter_keeps_its_lora(rounds):
    """The flags are for a new one."""
    policy = policy_of("--lora-rank", 3, "--lora-alpha", 5, adapter=rounds.trained / "adapter")
    config = policy.peft_config["default"]
    assert (config.r, config.lora_alpha) == (16, 32)
