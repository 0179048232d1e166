"""What does the language model hear, and is what it says drawn from its own distribution?"""
from importlib import import_module

import pytest
import torch

sampling = import_module("01_sample")

LIMIT = 14


@pytest.fixture
def no_end(demo, monkeypatch):
    """The demo without an end token: every response runs to the limit."""
    monkeypatch.setattr(demo[0].generation_config, "eos_token_id", [-1])
    return demo[0]


@pytest.fixture
def greedy(no_end, prompt_embeds):
    """What the four prompts are answered greedily, LIMIT tokens each."""
    return [responses[0] for responses, _ in sampling.sample_responses(no_end, prompt_embeds, 1, LIMIT, 0, 1.0)]


def whole_forward(model, embeds, tokens):
    """Logits of each of the tokens from the model's own pass over all of them, without a cache."""
    with torch.no_grad():
        inputs = torch.cat([embeds, model.get_input_embeddings()(tokens)])[None]
        return model(inputs_embeds=inputs, use_cache=False).logits[0, len(embeds) - 1:-1]


# What the language model hears.

@pytest.mark.parametrize("prompt", ["Translate.", "<audio> Translate.", "Listen: <audio> and translate."])
def test_a_prompt_has_one_place_for_the_recording(demo, prompt):
    processor = demo[1]
    text = sampling.render_prompt(processor, prompt)
    assert text.count(processor.audio_token) == 1 and "<audio>" not in text
    words = prompt.split("<audio>")[-1].strip()
    assert text.index(processor.audio_token) < text.index(words)
    if prompt.startswith("Listen"):
        assert text.index("Listen:") < text.index(processor.audio_token)


def test_a_prompt_with_the_placeholder_itself_is_refused(demo):
    with pytest.raises(sampling.UserError, match="write <audio>"):
        sampling.render_prompt(demo[1], "Listen to <|AUDIO|> and answer.")


def test_system_prompt_and_raw_prompt(demo):
    processor = demo[1]
    asked = sampling.render_prompt(processor, "Translate.", "Answer in German.")
    assert asked.index("Answer in German.") < asked.index("Translate.")
    assert asked != sampling.render_prompt(processor, "Translate.")
    raw = sampling.render_prompt(processor, "Translate.", raw=True)
    assert raw.endswith("Translate.") and "<|im_start|>" in asked and "<|im_start|>" not in raw


# One token.

LOGITS = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()


def shares(temperature, top_p, draws=40_000):
    torch.manual_seed(0)
    tokens = sampling.choose_tokens(LOGITS.expand(draws, -1), temperature, top_p)
    return (torch.bincount(tokens, minlength=4) / draws).tolist()


@pytest.mark.parametrize("temperature, top_p, wanted", [
    (1.0, 1.0, [0.5, 0.05, 0.3, 0.15]),
    (1.0, 0.9, [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95]),   # .5 + .3 is short of .9, + .15 is not
    (1.0, 0.7, [0.5 / 0.8, 0, 0.3 / 0.8, 0]),
    (1.0, 0.49, [1, 0, 0, 0]),                               # the likeliest alone fills it
    (1.0, 1e-6, [1, 0, 0, 0]),                               # and always stays
    (1.0, 0.0, [1, 0, 0, 0]),
    (0.5, 1.0, [0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),   # squared
    (0.5, 0.9, [0.25 / 0.34, 0, 0.09 / 0.34, 0]),            # .685 + .247: the nucleus is cut after heating
    (0, 0.9, [1, 0, 0, 0]),
])
def test_tokens_follow_the_cut_distribution(temperature, top_p, wanted):
    for share, probability in zip(shares(temperature, top_p), wanted):
        # five standard deviations of a share of 40,000 draws; exactly 0 and 1 where it must be
        assert abs(share - probability) <= 5 * (probability * (1 - probability) / 40_000) ** 0.5


def test_rows_are_drawn_on_their_own():
    logits = torch.full((3, 5), -50.0)
    logits[torch.arange(3), torch.tensor([4, 0, 2])] = 50.0
    assert sampling.choose_tokens(logits, 1.0, 0.9).tolist() == [4, 0, 2]


# Whole responses.

def test_greedy_decoding_equals_the_models_own_forward(no_end, prompt_embeds, greedy):
    """Prompts of different lengths, padded and with a cache, against whole passes without either."""
    for embeds, tokens in zip(prompt_embeds, greedy):
        logits = whole_forward(no_end, embeds, tokens)
        lead = logits.max(dim=1).values - logits.gather(1, tokens[:, None])[:, 0]
        assert len(tokens) == LIMIT and lead.max() < 1e-4


def test_a_response_sees_its_prompt_and_itself_alone(no_end, prompt_embeds, monkeypatch):
    """K different responses share a row of the cache; the logits that each was drawn from, step by
    step, are those of the model's own pass over prompt and response."""
    seen, draw = [], sampling.choose_tokens
    monkeypatch.setattr(sampling, "choose_tokens",
                        lambda logits, *settings: (seen.append(logits), draw(logits, *settings))[1])
    torch.manual_seed(0)
    sampled = sampling.sample_responses(no_end, prompt_embeds, 3, LIMIT, 2.0, 1.0)
    steps = torch.stack(seen).view(LIMIT, len(prompt_embeds), 3, -1)
    for n, (responses, _) in enumerate(sampled):
        assert len({tuple(row) for row in responses.tolist()}) == 3
        for k, tokens in enumerate(responses):
            torch.testing.assert_close(steps[:, n, k], whole_forward(no_end, prompt_embeds[n], tokens),
                                       atol=1e-3, rtol=0)


def test_responses_end_with_any_end_token_and_leave_the_others_alone(demo, prompt_embeds, greedy, monkeypatch):
    """Tokens of the greedy answers become end tokens: three equal rows a prompt end where they come
    first, at different steps, and go on as before until then."""
    ends = [int(greedy[0][2]), int(greedy[1][5]), int(greedy[2][9])]
    monkeypatch.setattr(demo[0].generation_config, "eos_token_id", ends)
    for (responses, lengths), whole in zip(
            sampling.sample_responses(demo[0], prompt_embeds, 3, LIMIT, 0, 1.0), greedy):
        places = [t for t, token in enumerate(whole.tolist()) if token in ends]
        length = places[0] + 1 if places else LIMIT
        assert lengths.tolist() == [length] * 3
        assert responses.tolist() == [whole[:length].tolist()] * 3


def test_lengths_padding_and_ends(demo, prompt_embeds, monkeypatch):
    """A fifth of the vocabulary ends a response, so that lengths differ within every prompt."""
    ends = list(range(1, 512, 5))
    monkeypatch.setattr(demo[0].generation_config, "eos_token_id", ends)
    torch.manual_seed(0)
    sampled = sampling.sample_responses(demo[0], prompt_embeds, 8, LIMIT, 3.0, 1.0)
    assert len(sampled) == len(prompt_embeds)
    for responses, lengths in sampled:
        assert responses.dtype == lengths.dtype == torch.int64
        assert responses.shape == (8, int(lengths.max())) and lengths.min() >= 1
        for row, length in zip(responses.tolist(), lengths.tolist()):
            assert not any(token in ends for token in row[:length - 1])
            assert row[length - 1] in ends or length == LIMIT
            assert row[length:] == [0] * (len(row) - length)
    assert len({int(length) for _, lengths in sampled for length in lengths}) > 3


def test_the_seed_decides(no_end, prompt_embeds):
    def draw(seed):
        torch.manual_seed(seed)
        return torch.cat([r for r, _ in sampling.sample_responses(no_end, prompt_embeds, 4, LIMIT, 2.0, 1.0)])

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert len({tuple(row) for row in draw(1).tolist()}) > 4  # and rows of a prompt are not alike


def test_many_prompts_come_back_in_their_order(no_end, prompt_embeds, greedy):
    found = sampling.sample_all(no_end, prompt_embeds, 3, 1, LIMIT, 0, 1.0)
    assert [responses[0].tolist() for responses, _ in found] == [tokens.tolist() for tokens in greedy]


# Text, and the order of the prompts.

@pytest.mark.parametrize("text", ["", "Grüße an alle", "Zeit: 5 Uhr\nTschüß 😀 日本", "  two  spaces "])
def test_ends_count_the_characters_that_are_complete(demo, text):
    """Byte tokens: an umlaut or an emoji spans several and counts with the last of them."""
    tokenizer = demo[1].tokenizer
    tokens = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    response = (torch.tensor([tokens]), torch.tensor([len(tokens)]))
    texts = sampling.decode_responses(tokenizer, *response)
    [ends] = sampling.text_ends(tokenizer, *response, texts)
    assert texts == [text] and int(ends[-1]) == len(text)
    spent = 0
    for token, end in zip(tokens[:-1], ends.tolist()):
        spent += len(tokenizer.convert_ids_to_tokens(token))  # a byte a letter
        assert text[:end] == text.encode()[:spent].decode(errors="ignore")
