"""`vlm_judge` by a model that runs here: a small Qwen2-VL of transformers' real classes, trained on its answers."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mfm_rewards
from mfm_rewards import RewardError, evaluate
from tests.backbones.fast import frozen  # noqa: F401
from tests.reward_servers import judging
from tests.tiny_judges import train_judge, write_judge

RUBRIC, SAID = "{prompt}?", 'Answer with JSON alone: {"score": a number from 0 to 10}'
SCORES = {("dark", "a cat"): 1.5, ("bright", "a cat"): 8, ("dark", "a dog"): 7, ("bright", "a dog"): 0}
LEVELS = {"dark": 20, "bright": 230}


def pixels(name):
    return np.full((28, 28, 3), LEVELS[name], dtype=np.uint8)


def images(*names):
    return torch.stack([torch.from_numpy(pixels(name)).permute(2, 0, 1) / 255 for name in names])


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = write_judge(tmp_path_factory.mktemp("judge") / "tiny")
    asked = [(pixels(n), f"{p}?\n{SAID}", json.dumps({"score": s})) for (n, p), s in SCORES.items()]
    asked += [(pixels(n), f"Rate {n}", f"Fine.\nFinal Score: {LEVELS[n]}") for n in LEVELS]
    train_judge(folder, asked)
    return folder


def build(folder, **options) -> Any:
    given = {"weights": str(folder), "rubric": RUBRIC, "precision": "fp32", "max_tokens": 40, **options}
    return mfm_rewards.build("vlm_judge", **given)


def test_scores_are_what_the_model_says_of_image_and_prompt(judge):
    reward = build(judge, scale=2.0)
    assert (reward.needs, reward.differentiable) == (("images", "prompts"), False)
    names, prompts = zip(*SCORES, strict=True)
    found = evaluate(reward, images(*names), list(prompts))
    assert found.tolist() == [2 * score for score in SCORES.values()]


def test_an_answer_is_the_most_probable_tokens_written_out(judge):
    """One token after the other by whole passes of the network, without `generate` and its cache."""
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    processor: Any = AutoProcessor.from_pretrained(str(judge))
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(str(judge)).eval()
    text = f"a dog?\n{SAID}"
    start = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[start], images=[Image.fromarray(pixels("dark"))], return_tensors="pt")
    tokens, more = inputs["input_ids"], {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        for _ in range(40):
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **more).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
            if tokens[0, -1] == processor.tokenizer.eos_token_id:
                break
    expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] : -1])
    assert build(judge).local.answer(pixels("dark"), text) == expected == '{"score": 7}'


def test_answers_of_a_form_of_their_own_are_read_by_a_pattern(judge):
    reward = build(judge, rubric="Rate {prompt}", pattern=r"(?s).*Final Score: ([0-9.]+)", high=255.0)
    found = evaluate(reward, images("dark", "bright"), ["dark", "bright"])
    assert found.tolist() == [20.0, 230.0]
    narrow = build(judge, rubric="Rate {prompt}", pattern=r"(?s).*Final Score: ([0-9.]+)", high=10.0)
    with pytest.raises(RewardError, match=r"with a number from 0 to 10, got 'Fine.\\nFinal Score: 20'"):
        evaluate(narrow, images("dark"), ["dark"])
    with judging() as server:
        served = mfm_rewards.build(
            "vlm_judge", url=server.url, model="m", rubric="Rate {prompt}", pattern=r"Score: (\d+)", attempts=1
        )
        server.faults = ["Score: 4"]
        assert evaluate(served, images("dark"), ["it"]).tolist() == [4.0]
        body = server.asked[0][2]
        assert "response_format" not in body
        assert body["messages"][0]["content"][0]["text"] == "Rate it"
        server.faults = ["Score: many"]
        with pytest.raises(RewardError, match=r"not of the form.*expected Score: \(\\d\+\) with a number from 0 to 10"):
            evaluate(served, images("dark"), ["it"])


def test_answers_of_another_form_end_it(judge):
    with pytest.raises(RewardError, match=r"tiny: an answer that is not of the form: the answer was cut off"):
        evaluate(build(judge, max_tokens=5), images("dark"), ["a cat"])
    said = r'an answer that is not of the form: expected \{"score": a number from 0 to 3\}, got '
    with pytest.raises(RewardError, match=said):
        evaluate(build(judge, high=3.0), images("bright"), ["a cat"])


def test_scores_are_kept_by_the_models_files(judge, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = build(judge, cache=cache)
    expected = evaluate(first, images("dark"), ["a cat"])
    again = build(judge, cache=cache)
    monkeypatch.setattr(again.local, "answer", lambda *_: pytest.fail("asked again"))
    assert torch.equal(evaluate(again, images("dark"), ["a cat"]), expected)
    other = shutil.copytree(judge, tmp_path / "tiny")
    weights = other / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert build(judge).model == first.model
    assert build(other).model.split()[1] != first.model.split()[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "http://127.0.0.1:9/v1", "model": "m"}, "give url and model, of an API, or weights"),
        ({"weights": None}, "give url and model, of an API, or weights"),
        ({"model": "m"}, "give url and model, of an API, or weights"),
        ({"weights": "nowhere"}, "no vision-language model at nowhere"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"pattern": "("}, r"pattern '\(' is no regular expression"),
        ({"pattern": "a"}, "pattern 'a' has 0 groups: expected one, the score"),
        ({"pattern": "(a)", "rubric": None}, "give a rubric that asks for answers of that form"),
    ],
)
def test_wrong_options(judge, options, said):
    with pytest.raises((RewardError, FileNotFoundError), match=said):
        build(judge, **options)


def test_a_folder_that_is_no_chat_model_is_refused(judge, tmp_path):
    other = shutil.copytree(judge, tmp_path / "tiny")
    for name in ("chat_template.json", "chat_template.jinja"):
        (other / name).unlink(missing_ok=True)
    with pytest.raises(RewardError, match="has no chat template"):
        build(other)
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RewardError, match="no vision-language model in"):
        build(other)
