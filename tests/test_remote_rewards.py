"""A reward on a server, against a real one on this machine's loopback address."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ctrl_diffusion as cd
from ctrl_diffusion.image_rewards import RemoteScores
from ctrl_diffusion.rewards import RewardError, compute_rewards
from experiments.reward_registry import RewardSettings, make_reward

IMAGES = np.linspace(-1, 1, 3 * 4 * 4 * 3, dtype=np.float32).reshape(3, 4, 4, 3)


class Handler(BaseHTTPRequestHandler):
    """Mean pixel, plus the length of the prompt, plus a field of its metadata; `server.answers` come before that."""

    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(told)  # pyright: ignore
        status, body = self.server.answers.pop(0) if self.server.answers else (200, None)  # pyright: ignore
        if status == "slow":
            time.sleep(1.0)
            status = 200
        if body is None:
            pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in told["images"]]
            rows = zip(pictures, told["prompts"], told["metadata"])
            body = json.dumps({"scores": [float(p.mean()) + len(text) + row.get("count", 0) for p, text, row in rows]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.answers, found.seen = [], []  # pyright: ignore
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def scores(server, **options):
    return RemoteScores(f"http://127.0.0.1:{server.server_port}/score", wait=0.01, **options)


def expected():
    return np.round(127.5 * (IMAGES.astype(np.float64) + 1)).mean(axis=(1, 2, 3))


def test_images_prompts_and_metadata_go_and_scores_come(server):
    found = scores(server)(IMAGES, ["a", "bb", ""], [{"count": 10}, {}, {"count": 1}])
    np.testing.assert_allclose(found, expected() + [11, 2, 1])


def test_by_the_command_line_s_registry(server):
    settings = RewardSettings(prompts=["a", "bb"], metadata=[{}, {"count": 5}])
    reward = make_reward([f"http://127.0.0.1:{server.server_port}/score"], (), settings)
    found = compute_rewards(reward, jnp.asarray(IMAGES), jnp.asarray([1, 0, 1]))
    np.testing.assert_allclose(found, expected() + [7, 1, 7], rtol=1e-6)


def test_what_fails_for_a_moment_is_sent_again(server):
    server.answers = [(503, b"busy"), ("slow", None)]
    found = scores(server, retries=2, time_limit=0.3)(IMAGES, ["", "", ""])
    np.testing.assert_allclose(found, expected())
    assert len(server.seen) == 3 and server.seen[0] == server.seen[2]


WRONG = {
    "status": ([(400, b"no such model")], r"answered with status 400: b'no such model'"),
    "always": ([(500, b"")] * 2, r"answered with status 500: b'', 2 times"),
    "text": ([(200, b"<html>")], r"answered b'<html>': it must be"),
    "field": ([(200, b'{"score": [1, 2, 3]}')], r"it must be {\"scores\": \[numbers\]}"),
    "count": ([(200, b"[1, 2]")], r"gave scores of shape \(2,\) for 3 images"),
    "nan": ([(200, b"[1, NaN, 2]")], r"returned nan for sample 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_it_cannot_use_is_said(server, name):
    server.answers, message = list(WRONG[name][0]), WRONG[name][1]
    reward = cd.black_box(lambda images: scores(server, retries=1)(images, [""] * 3), "remote")
    with pytest.raises(RewardError, match=message):
        compute_rewards(reward, jnp.asarray(IMAGES))


def test_a_server_that_is_not_there_and_bad_arguments():
    with pytest.raises(RuntimeError, match=r"127.0.0.1:9/ gave no answer .* within time_limit=60 seconds, 1 times"):
        RemoteScores("http://127.0.0.1:9/", retries=0)(IMAGES, [""] * 3)
    for make, message in (
        (lambda: RemoteScores("ftp://here"), "must begin with http"),
        (lambda: RemoteScores("http://here", time_limit=0.0), "time_limit=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
