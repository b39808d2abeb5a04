"""`vlm_judge` against a small server that answers like a vision-language model, rightly and wrongly."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

import mfm_rewards
from mfm_rewards import RewardError, evaluate
from mfm_rewards.testing import smooth_images
from tests.reward_servers import FakeJudge, Fault, judging

PROMPTS = ["a cat", "a dog {x}", "ein Fuß"]
KEY = "sk-not-for-any-log"


def build(server: FakeJudge, **options):
    return mfm_rewards.build("vlm_judge", **{"url": server.url, "model": "judge-7b", "wait": 0.01, **options})


def rounded(images):
    return (images * 255).round().mean(dim=(1, 2, 3)) / 25.5


def test_scores_are_those_of_each_image_and_prompt():
    images = smooth_images(3, size=16)
    with judging() as server:
        reward = build(server, scale=2.0, low=-1, max_tokens=9)
        assert reward.needs == ("images", "prompts")
        torch.testing.assert_close(evaluate(reward, images, PROMPTS), 2 * rounded(images))
        assert {path for path, _, _ in server.asked} == {"/v1/chat/completions"}
        asked = [body["messages"][0]["content"][0]["text"] for _, _, body in server.asked]
        for prompt in PROMPTS:
            (text,) = [text for text in asked if f"Prompt: {prompt}\n" in text]
            assert text.endswith('Answer with JSON alone: {"score": a number from -1 to 10}')
        body = server.asked[0][2]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-7b", 0, 9)
        assert body["response_format"] == {"type": "json_object"}
        assert server.asked[0][1] is None  # no key
        plain = build(server, rubric="How bright?", json_mode=False)
        assert plain.needs == ("images",)
        grey = smooth_images(2, channels=1)
        torch.testing.assert_close(evaluate(plain, grey), rounded(grey))
        assert "response_format" not in server.asked[-1][2]


def test_scores_are_kept_by_image_prompt_rubric_range_and_model(tmp_path, caplog):
    images = smooth_images(3, size=16)
    with judging() as server:
        cached = {"cache": str(tmp_path / "cache")}
        first = evaluate(build(server, **cached), images, PROMPTS)
        assert len(server.asked) == 3
        assert torch.equal(evaluate(build(server, **cached), images.flip(0), PROMPTS[::-1]), first.flip(0))
        assert len(server.asked) == 3
        evaluate(build(server, **cached), images[[0, 0, 1]], ["new", "new", PROMPTS[1]])  # equal ones are asked once
        assert len(server.asked) == 4
        others = ({"model": "other"}, {"rubric": "{prompt}?"}, {"high": 20})
        for number, other in enumerate(others, 1):
            evaluate(build(server, **cached, **other), images[:1], PROMPTS[:1])
            assert len(server.asked) == 4 + number
        evaluate(build(server, **cached), images[:1] + 0.01, PROMPTS[:1])
        assert len(server.asked) == 8
        files = sorted((tmp_path / "cache").rglob("*"))
        assert len([file for file in files if file.suffix == ".json"]) == 8
        assert not [file for file in files if file.suffix == ".partial"]
        for file in files:
            if file.is_file():
                file.write_text('{"score": 1')  # cut off
        with caplog.at_level(logging.WARNING):
            assert torch.equal(evaluate(build(server, **cached), images, PROMPTS), first)
        assert "is left out: expected" in caplog.messages[0]
        assert len(server.asked) == 11


CHAT = {"message": {"role": "assistant", "content": '{"score": 3'}, "finish_reason": "length"}
REFUSED = {"message": {"role": "assistant", "content": None, "refusal": "no"}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("7", "expected .*got '7'"),
        ("A score of 7/10.", "expected .*got 'A score of 7/10.'"),
        ('```json\n{"score": 7}\n```', "expected .*got '```json"),
        ('{"score": "7"}', "expected"),
        ('{"score": true}', "expected"),
        ('{"score": NaN}', "expected"),
        ('{"score": 10.01}', r'expected \{"score": a number from 0 to 10\}'),
        ('{"score": -1}', "expected"),
        ('{"rating": 7}', "expected"),
        ('{"score": 7, "and": 8}', "expected"),
        ('[{"score": 7}]', "expected"),
        (Fault.status(200, {"choices": [CHAT]}), "cut off: raise max_tokens"),
        (Fault.status(200, {"choices": [REFUSED]}), "no text in the answer"),
        (Fault.status(200, {"choices": []}), "no chat completion"),
        (Fault.status(200, {"object": "error"}), "no chat completion"),
    ],
)
def test_answers_of_another_form_are_asked_for_again_and_then_refused(answer, said, caplog):
    image = smooth_images(1)
    with judging() as server:
        reward = build(server, attempts=2)
        server.faults = [answer]
        with caplog.at_level(logging.WARNING):
            torch.testing.assert_close(evaluate(reward, image, ["a"]), rounded(image))
        assert "asked again, 2 of 2" in caplog.messages[0]
        server.faults = [answer, answer]
        with pytest.raises(RewardError, match=rf"(?s){server.url}/chat/completions: .*2 time.*judge-7b.*{said}"):
            evaluate(reward, image, ["a"])
        assert len(server.asked) == 4


def test_the_first_failure_ends_it_and_what_was_scored_is_kept(tmp_path):
    images = smooth_images(6)
    with judging() as server:
        server.faults = ['{"score": 1}', '{"score": 2}', Fault.status(400, {"error": {"message": "too many pixels"}})]
        options = {"cache": str(tmp_path), "workers": 1}
        with pytest.raises(RewardError, match=r"status 400, too many pixels$"):
            evaluate(build(server, **options), images, ["a"] * 6)
        assert len(server.asked) <= 4
        kept = len(list(tmp_path.rglob("*.json")))
        assert 2 <= kept <= 3
        done = len(server.asked)
        found = evaluate(build(server, **options), images, ["a"] * 6)
        assert found[:2].tolist() == [1, 2]
        torch.testing.assert_close(found[2:], rounded(images)[2:])
        assert len(server.asked) == done + 6 - kept


def test_a_busy_server_and_one_that_is_gone(caplog):
    image = smooth_images(1)
    with judging() as server:
        server.faults = [Fault.status(429, {"error": {"message": "slow down"}}, "Retry-After: 0"), Fault()]
        with caplog.at_level(logging.WARNING):
            torch.testing.assert_close(evaluate(build(server, retries=2), image, ["a"]), rounded(image))
        assert ["status 429, slow down" in message for message in caplog.messages] == [True, False]
        reward = build(server, retries=1)
    with pytest.raises(RewardError, match=r"/v1/chat/completions: ConnectionRefusedError.*tried 2 times"):
        evaluate(reward, image, ["a"])


def test_the_key_is_sent_and_never_shown(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    image = smooth_images(1)
    with judging() as server, caplog.at_level(logging.DEBUG):
        reward = build(server, key_variable="JUDGE_KEY", attempts=1, retries=1, cache=str(tmp_path))
        evaluate(reward, image, ["a"])
        assert server.asked[0][1] == f"Bearer {KEY}"
        assert KEY not in json.dumps(server.asked[0][2])
        told = f"Incorrect API key provided: {KEY}"
        for status in (401, 503):
            server.faults = [Fault.status(status, {"error": {"message": told}})] * 2
            with pytest.raises(RewardError, match=rf"status {status}, Incorrect API key provided: \*\*\*") as refused:
                evaluate(reward, image, ["b"])
            assert KEY not in str(refused.value)
        server.faults = [told]
        with pytest.raises(RewardError, match="not of the form") as refused:
            evaluate(reward, image, ["c"])
        assert KEY not in str(refused.value)
    assert KEY not in f"{reward} {reward.endpoint!r} {caplog.text}"
    assert KEY not in "".join(file.read_text() for file in Path(tmp_path).rglob("*.json"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"low": 1, "high": 1}, r"low \(1\) must be below high \(1\)"),
        ({"workers": 0}, "workers must be a whole number"),
        ({"attempts": 0}, "attempts must be a whole number"),
        ({"url": "judge"}, "must be like http://"),
        ({"key_variable": KEY}, "^(?!.*sk-not).*must be the name of an environment variable, and no key"),
        ({"key_variable": "NOT_SET_HERE"}, "key_variable NOT_SET_HERE: no such environment variable is set"),
        ({"key_variable": "HOME", "url": "http://judge.example/v1"}, "without encryption: give one of https"),
        ({"cache": __file__}, "is a file: expected a folder"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(RewardError, match=said):
        mfm_rewards.build("vlm_judge", **{"url": "http://127.0.0.1:9/v1", "model": "m", **options})


def test_images_that_are_not_finite_are_not_sent():
    reward = mfm_rewards.build("vlm_judge", url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(RewardError, match="not finite cannot be judged"):
        evaluate(reward, torch.full((1, 3, 4, 4), torch.nan), ["a"])
