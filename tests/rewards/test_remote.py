"""The reward `remote` and its server, over loopback: the same numbers as here, and all that goes wrong with servers."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mfm_rewards
from mfm_lightning.commands.main import main
from mfm_rewards import Reward, RewardError, evaluate
from mfm_rewards.testing import check_reward, smooth_images
from mfm_rewards.wire import pack, unpack
from tests.processes import ended, forked
from tests.reward_servers import Fault, served

ROOT = Path(__file__).parents[2]
QUICK = {"wait": 0.01, "timeout": 5.0}


class OfAll(Reward):
    """Depends on prompts, labels and pixels, and not linearly."""

    needs = ("images", "prompts", "labels")

    def forward(self, images, prompts, labels):
        lengths = torch.tensor([float(len(p)) for p in prompts])
        return (images.square().mean(dim=(1, 2, 3)) * lengths).sin() + 0.1 * labels


class Slowly(Reward):
    """How many are in it at once."""

    def __init__(self):
        super().__init__()
        self.inside = self.most = 0

    def forward(self, images):
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.05)
        self.inside -= 1
        return images.mean(dim=(1, 2, 3))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_rewards_and_gradients_are_the_local_ones():
    images, local = smooth_images(5, seed=3), OfAll()
    prompts, labels = ["a", "bcd", "", "ein Fuß", "x" * 300], torch.tensor([4, 0, -1, 2**40, 7])
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    with served(local) as server:
        remote = mfm_rewards.build("remote", url=server.url, gradients=True, max_rows=2, **QUICK)
        assert remote.needs == local.needs
        found = []
        for reward in (local, remote):
            x = images.clone().requires_grad_()
            values = evaluate(reward, x, prompts, labels)
            (gradient,) = torch.autograd.grad((values * weights).sum(), x)
            found.append((values.detach(), gradient))
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)
        assert server.asked == ["/rewards"] * 3 + ["/gradients"] * 3  # 2 + 2 + 1 images
        plain = mfm_rewards.build("remote", url=server.url, **QUICK)
        assert not plain.differentiable
        assert not evaluate(plain, images.clone().requires_grad_(), prompts, labels).requires_grad
        half = evaluate(remote, images.bfloat16(), prompts, labels)
        torch.testing.assert_close(half, evaluate(local, images.bfloat16().float(), prompts, labels))


def test_a_black_box_passes_the_checks_of_rewards():
    with served("jpeg_compressibility") as server:
        check_reward(mfm_rewards.build("remote", url=server.url, **QUICK)).raise_for_failures()


def test_images_of_8_bits():
    images = smooth_images(3) * 1.2 - 0.1  # some out of [0, 1]
    with served("brightness") as server:
        remote = mfm_rewards.build("remote", url=server.url, dtype="uint8", **QUICK)
        rounded = (images.clamp(0, 1) * 255).round() / 255
        torch.testing.assert_close(remote(images), evaluate(mfm_rewards.build("brightness"), rounded))
        images[1, 0, 0, 0] = torch.nan
        with pytest.raises(RewardError, match="not finite cannot be sent as uint8"):
            remote(images)


SLOW, TRUNCATED = Fault(after=0.6), Fault(b"HTTP/1.0 200 OK\r\nContent-Length: 90\r\n\r\n{")
SILENT, BUSY = Fault(), Fault.status(503, {"error": "loading"}, "Retry-After: 0")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (SLOW, "no answer within 0.2 s"),
        (TRUNCATED, "the answer ended after 1 bytes, 89 before its end"),
        (SILENT, "RemoteDisconnected"),
        (BUSY, "status 503, loading"),
        (Fault.status(429, b""), "status 429"),
        (Fault(b"SSH-2.0-what\r\n"), "BadStatusLine"),
    ],
)
def test_what_passes_is_tried_again(fault, said, caplog):
    images, expected = smooth_images(3), evaluate(mfm_rewards.build("contrast"), smooth_images(3))
    with served("contrast") as server:
        options = {"url": server.url, "wait": 0.01, "timeout": 0.2}
        remote = mfm_rewards.build("remote", retries=2, **options)
        server.faults = [fault, fault]
        with caplog.at_level(logging.WARNING):
            torch.testing.assert_close(evaluate(remote, images), expected)
        assert [said in message for message in caplog.messages] == [True, True]
        assert "try 2 of 3 in 0.01 s" in caplog.messages[0]
        assert "try 3 of 3 in 0.02 s" in caplog.messages[1]  # the waits grow
        server.faults = [fault] * 3
        with pytest.raises(RewardError, match=rf"{server.url}/rewards: .*{said}.*; tried 3 times in .* is the server"):
            evaluate(remote, images)
        assert not server.faults


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"rewards": [0.1, 0.2]}, "2 rewards for 3 images"),
        ({"rewards": [0.1, float("nan"), 0.2]}, "not finite for 1 of 3 images, first 1"),
        ({"rewards": [0.1, 0.2, 1e39]}, "not finite for 1 of 3 images, first 2"),
        ({"rewards": [0.1, "0.2", 0.3]}, "not numbers alone"),
        ({"rewards": [0.1, True, 0.3]}, "not numbers alone"),
        ({"reward": [0.1, 0.2, 0.3]}, "without a list of rewards"),
        ([0.1, 0.2, 0.3], "JSON, but no object"),
        (b'{"rewards": [0.1, 0.', "no JSON"),
        (b"\xff\x00", "no JSON"),
    ],
)
def test_wrong_answers_are_refused_at_once(content, said):
    with served("contrast") as server:
        remote = mfm_rewards.build("remote", url=server.url, **QUICK)
        server.faults = [Fault.status(200, content)]
        with pytest.raises(RewardError, match=rf"{server.url}/rewards: the server's answer is {said}"):
            evaluate(remote, smooth_images(3))
        assert server.asked == ["/rewards"]
        assert len(evaluate(remote, smooth_images(3))) == 3


def test_wrong_gradients_are_refused():
    images = smooth_images(3).requires_grad_()
    ones, holes = torch.ones(3, 3, 48, 48), torch.ones(3, 3, 48, 48)
    holes[2, 0, 0, 0] = torch.inf
    with served("contrast") as server:
        remote = mfm_rewards.build("remote", url=server.url, gradients=True, **QUICK)
        for content, said in (
            (pack({"gradients": ones[:2]}), r"float32 of shape \(2, 3, 48, 48\): expected float32 \(3, 3, 48, 48\)"),
            (pack({"gradients": ones.double()}), "float64"),
            (pack({"gradients": holes}), "not finite"),
            (pack({"gradient": ones}), "no gradients"),
            (pack({"gradients": ones})[:-4], "no gradients"),
            (b"", "no gradients"),
        ):
            values = evaluate(remote, images)
            server.faults = [Fault.status(200, content)]
            with pytest.raises(RewardError, match=f"/gradients: the server's answer is .*{said}"):
                values.sum().backward()


def test_a_server_that_is_gone_and_comes_back():
    images, port = smooth_images(3), free_port()
    with served("contrast", port=port) as server:
        remote = mfm_rewards.build("remote", url=server.url, retries=1, **QUICK)
        expected = evaluate(remote, images)
    with pytest.raises(RewardError, match=r"/rewards: ConnectionRefusedError.*tried 2 times in .* s: is the server"):
        evaluate(remote, images)
    with pytest.raises(RewardError, match="ConnectionRefusedError"):
        mfm_rewards.build("remote", url=f"http://127.0.0.1:{port}", retries=0, **QUICK)
    patient, found = mfm_rewards.registry.factory("remote"), []
    with served("contrast", port=port) as server:
        patient = patient(server.url, retries=20, **QUICK | {"wait": 0.05})
    asking = threading.Thread(target=lambda: found.append(patient(images)))
    asking.start()
    time.sleep(0.2)
    with served("contrast", port=port) as server:  # started again
        asking.join(timeout=20)
        torch.testing.assert_close(found, [expected])
        torch.testing.assert_close(evaluate(remote, images), expected)
    with (
        served("brightness", port=port),
        pytest.raises(RewardError, match=r"status 409, another reward, or other options, than .* now 'brightness'"),
    ):
        evaluate(remote, images)
    with (
        served("contrast", port=port, options={"scale": 2}),
        pytest.raises(RewardError, match=r"status 409, another reward, or other options"),
    ):
        evaluate(remote, images)


def test_two_clients_at_once():
    slowly, found = Slowly(), {}
    with served(slowly) as server:

        def ask(seed: int) -> None:
            remote = mfm_rewards.build("remote", url=server.url, max_rows=1, **QUICK)
            found[seed] = evaluate(remote, smooth_images(4, seed=seed))

        clients = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(timeout=20)
    assert slowly.most == 1
    for seed in (1, 2):
        torch.testing.assert_close(found[seed], smooth_images(4, seed=seed).mean(dim=(1, 2, 3)))


def test_the_rewards_own_errors_are_told_and_not_tried_again():
    with served(lambda images: images.sum(dim=(1, 2, 3)) / 0) as server:
        remote = mfm_rewards.build("remote", url=server.url, **QUICK)
        with pytest.raises(RewardError, match=r"status 422, reward '<lambda>' returned 3 of 3 values not finite"):
            evaluate(remote, smooth_images(3))
        assert server.asked == ["/rewards"]
    with served(OfAll()) as server:
        remote = mfm_rewards.build("remote", url=server.url, **QUICK)
        with pytest.raises(RewardError, match="'OfAll' needs prompts: give one for each image"):
            evaluate(remote, smooth_images(3))
        assert not server.asked  # before any request


def test_large_requests():
    images, wanted = smooth_images(9), evaluate(mfm_rewards.build("contrast"), smooth_images(9))
    with served("contrast", max_bytes=60_000) as server:  # an image is 27,648 bytes
        remote = mfm_rewards.build("remote", url=server.url, **QUICK)
        torch.testing.assert_close(evaluate(remote, images), wanted)
        assert len(server.asked) == 9
        with pytest.raises(
            RewardError, match=r"a request of 1 images is 150\d+ bytes, .* 60000: raise its --max-request"
        ):
            evaluate(remote, smooth_images(1, size=112))
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
        for body, status, said in (
            (b"x" * 5_000_000, 413, "a request of 5000000 bytes: at most 60000 are taken"),
            (b"x" * 50, 400, "no tensors with a JSON header"),
            (pack({"images": images[:1]}), 409, "another reward"),
        ):
            connection.request("POST", "/rewards", body)
            answer = connection.getresponse()
            assert answer.status == status
            assert said in json.loads(answer.read())["error"]
        connection.putrequest("POST", "/rewards")
        connection.endheaders()  # without a length
        assert connection.getresponse().status == 411


def test_requests_are_checked():
    images = torch.rand(2, 3, 4, 4)
    with served(OfAll()) as server:
        known = server.description["identity"]
        for tensors, fields, said in (
            ({}, {}, "images .* are needed, got none"),
            ({"images": images.double()}, {}, "float32 or uint8 are needed, got torch.float64"),
            ({"images": images}, {"prompts": ["a"]}, "prompts must be a list of 2 of str"),
            ({"images": images}, {"labels": [1, 2.5]}, "labels must be a list of 2 of int"),
            ({"images": images}, {"label": [1, 2]}, "unknown field 'label'"),
        ):
            with pytest.raises(Exception, match=said) as refused:
                server.answer("/rewards", pack(tensors, identity=known, **fields))
            assert refused.value.status == 400
        context = {"prompts": ["a", "b"], "labels": [1, 2]}
        with pytest.raises(Exception, match=r"float32 weights of shape \(2,\)"):
            server.answer("/gradients", pack({"images": images}, identity=known, **context))
        tensors, _ = unpack(server.answer("/gradients", pack(
            {"images": images, "weights": torch.zeros(2)}, identity=known, **context))[1])  # fmt: skip
        assert not tensors["gradients"].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "127.0.0.1:80"}, "must be like http://127.0.0.1:8765"),
        ({"url": "ftp://a"}, "must be like http://127.0.0.1:8765"),
        ({"url": "http://me:secret@host"}, "^(?!.*secret).*holds a user or password"),
        ({"url": "http://h", "timeout": 0}, "timeout must be a positive number"),
        ({"url": "http://h", "wait": float("nan")}, "wait must be a positive number"),
        ({"url": "http://h", "retries": -1}, "retries must be a whole number"),
        ({"url": "http://h", "max_rows": 0}, "max_rows must be a whole number"),
        ({"url": "http://h", "dtype": "bf16"}, "expected one of float32, uint8"),
        ({"url": "http://h", "dtype": "uint8", "gradients": True}, "gradients need dtype float32"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(RewardError, match=said):
        mfm_rewards.build("remote", **options)


def test_what_is_no_server_of_rewards():
    right = {"version": 1, "name": "a", "needs": ["images"], "differentiable": True, "identity": "", "max_bytes": 9}
    with served("jpeg_compressibility") as server:
        for fault, said in (
            (Fault.status(200, {"status": "ok"}), "not that of mfm rewards --serve: no version"),
            (Fault.status(200, {**right, "version": 2}), "of version 2, expected 1"),
            (Fault.status(200, {**right, "needs": ["images", "depth"]}), "that its reward needs .*depth"),
            (Fault.status(404, b"nothing"), "status 404, nothing"),
            (Fault.status(302, b"", "Location: http://127.0.0.1:1/"), "status 302"),
        ):
            server.faults = [fault]
            with pytest.raises(RewardError, match=said):
                mfm_rewards.build("remote", url=server.url, **QUICK)
        with pytest.raises(RewardError, match="'jpeg_compressibility' is not differentiable: leave out gradients"):
            mfm_rewards.build("remote", url=server.url, gradients=True, **QUICK)


def predict(reward: str, output: str) -> list[str]:
    """Steering of four digits by the reward's gradient."""
    short = ["--data.init_args.num_samples=4", "--return_predictions=false", "--model.init_args.base_steps=2"]
    short += ["--model.init_args.method.init_args.grid.steps=3", f"--trainer.default_root_dir={output}"]
    return ["predict", "--config", "configs/digits/steer.yaml", f"--model.init_args.target.reward={reward}", *short]


def test_mfm_predict_with_a_served_reward(folder):
    port = free_port()

    def serve() -> None:
        options = ["--option", "reward=contrast", "factor=20"]
        with Path("served.txt").open("w", buffering=1) as file:
            sys.stdout = sys.stderr = file
            main(["rewards", "--serve", "scale", *options, f"--port={port}"])

    server = forked(serve)
    try:
        main(predict(f"{{name: remote, url: 'http://127.0.0.1:{port}', gradients: true, wait: 0.1}}", "remote"))
    finally:
        os.kill(server.pid, signal.SIGTERM)
        status = ended(server)
    said = Path("served.txt").read_text()
    assert status == 128 + signal.SIGTERM, said
    assert f"serving scale at http://127.0.0.1:{port}, on cpu: from images, with gradients" in said
    assert f"reward: {{name: remote, url: 'http://127.0.0.1:{port}', gradients: true}}" in said
    main(predict("{name: scale, reward: contrast, factor: 20}", "local"))
    remote, local = (load_file(f"{name}/predict/batch_0000.safetensors") for name in ("remote", "local"))
    torch.testing.assert_close(remote, local, rtol=1e-5, atol=1e-5)


def test_nothing_is_lost_where_the_server_dies(folder):
    with served("contrast") as server:
        server.dies_after = 4  # base flow; two steps' rewards and a gradient
        reward = f"{{name: remote, url: '{server.url}', gradients: true, wait: 0.01, retries: 1}}"
        with pytest.raises(SystemExit, match=r"step 2 of 3 .*/gradients: .*tried 2 times.*states so far are in"):
            main(predict(reward, "dead"))
    states = load_file("dead/predict/batch_0000_unfinished.safetensors")["states"]
    assert states.shape == (4, 1, 8, 8)
    assert states.isfinite().all()


def test_serving_is_refused_before_any_work(capsys):
    with served("contrast") as server:
        port = server.server_address[1]
        for arguments, said in (
            (["--serve", "contrast", "--port", str(port)], f"cannot listen at 127.0.0.1, port {port}: .* in use"),
            (["--serve", "contrast", "--port", "70000"], "port 70000 must be in 0..65535"),
            (["--serve", "contrast", "--max-request", "0"], "max_bytes 0 must be at least 1"),
            (["--serve", "contrst"], "did you mean 'contrast'"),
        ):
            with pytest.raises(SystemExit, match=said):
                main(["rewards", *arguments])
    for arguments, said in (
        (["--prompt", "a"], "--serve takes images, prompts and labels from its clients: leave them out"),
        (["--check", "contrast"], "--check and --serve: one at a time"),
    ):
        with pytest.raises(SystemExit):
            main(["rewards", "--serve", "contrast", *arguments])
        assert said in capsys.readouterr().err
