"""Rewards that a server computes: images and prompts go to it as JSON, scores come back."""

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .jpeg import as_eight_bits


class RemoteScores:
    """Scores of a server, `scores(images [b, h, w, 3] in [-1, 1], prompts, metadata) -> [b]`; a black box.

    Each call sends one POST request with the JSON object

        {"images": [PNG files in base64], "prompts": [strings], "metadata": [objects]}

    and expects `{"scores": [numbers]}`, or a list of numbers, one for each image. Nothing that comes back is executed.

    Args:
        url: address of the server, `http://` or `https://`.
        time_limit: seconds that a request may take.
        retries: how often a request is sent again after an error of the network, a time-out or a status of 500 and above.
        wait: seconds before the first of these, doubled each time.

    Raises:
        ValueError: for another kind of address, or numbers out of range.
    """

    def __init__(self, url: str, *, time_limit: float = 60.0, retries: int = 3, wait: float = 1.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r} must begin with http:// or https://.")
        if not (time_limit > 0 and retries >= 0 and wait >= 0):
            raise ValueError(f"time_limit={time_limit} must be positive, retries={retries} and wait={wait} at least 0.")
        self.url, self.time_limit, self.retries, self.wait = url, time_limit, retries, wait
        self.__name__ = url.split("/")[2]

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """The scores; `RuntimeError` if the server does not give them."""
        told: dict[str, Any] = {"images": [_png(image) for image in as_eight_bits(images)], "prompts": list(prompts)}
        told["metadata"] = [dict(row) for row in metadata or [{}] * len(images)]
        answer = self._sent(json.dumps(told).encode())
        try:
            found = json.loads(answer)
            scores = found["scores"] if isinstance(found, dict) else found
            values = np.asarray(scores, np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeError(f'{self.url} answered {answer[:80]!r}: it must be {{"scores": [numbers]}}.') from error
        if values.shape != (len(images),):
            raise RuntimeError(f"{self.url} gave scores of shape {values.shape} for {len(images)} images.")
        return values

    def _sent(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        problem = ""
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.time_limit) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                problem = f"{self.url} answered with status {error.code}: {error.read()[:200]!r}"
                if error.code < 500:
                    raise RuntimeError(problem) from error
            except OSError as error:  # no connection, or the time limit
                problem = f"{self.url} gave no answer ({error}) within time_limit={self.time_limit:g} seconds"
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        raise RuntimeError(f"{problem}, {self.retries + 1} times.")


def _png(image: np.ndarray) -> str:
    from PIL import Image  # not needed for anything else in the library

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
