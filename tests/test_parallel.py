"""Runs `parallel_*.py` where there are eight devices, and real processes that must equal one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import safetensors.numpy

from tests.compiling import flags

REPOSITORY = Path(__file__).parent.parent
EIGHT = ("parallel_samples", "parallel_cases", "parallel_programs")
pytestmark = pytest.mark.slow


def environment(devices, flags=""):
    flags = f"{flags} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}


def test_eight_devices():
    files = [f"tests/{name}.py" for name in EIGHT]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def parameters(out):
    return safetensors.numpy.load_file(out / "model" / "params.safetensors")


def start(devices, *command, stderr=subprocess.STDOUT):
    """A process that runs a module."""
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment(devices, flags()),
        stdout=subprocess.PIPE, stderr=stderr, text=True,
    )  # fmt: skip


def killed(out, point, devices=1):
    """A run that ends at a point."""
    process = start(devices, "tests.killed", point, "--out", str(out), stderr=subprocess.PIPE)
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with a replay buffer that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert killed(out, "never") == (0, ANY)
    return out


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a run after SIGKILL in an update and while a checkpoint was written."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    for point in ("update", "checkpoint"):
        assert killed(out, point) == (-signal.SIGKILL, ANY)
    return out


def test_an_interrupted_run_ends_bit_for_bit_as_if_it_had_not_been(tmp_path, whole, interrupted):
    """Last by a full disk: no file may grow beyond 8 kB; what was written before is used."""
    run = shutil.copytree(interrupted, tmp_path / "run")
    code, message = killed(run, "disk")
    expected = "error: a checkpoint cannot be written to .*File too large.*MiB are free there"
    assert code == 1 and re.search(expected, message), message
    assert killed(run, "never") == (0, ANY)
    expected = parameters(whole)
    for name, found in parameters(run).items():
        np.testing.assert_array_equal(found, expected[name])
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row["phase"] == "finetune"] == list(range(6))


def test_a_run_goes_on_with_other_devices(tmp_path, whole, interrupted):
    """Checkpoints of one device, the replay buffer in them, are restored on four."""
    run = shutil.copytree(interrupted, tmp_path / "run")
    assert killed(run, "never", devices=4) == (0, ANY)
    expected = parameters(whole)
    for name, found in parameters(run).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-3, atol=1e-5)


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def test_a_reward_that_fails_on_one_process_ends_both():
    """Neither waits for the other, which would be forever; each judges the rows of its two devices, in their order.

    Together they make an iteration, with all parameters on every device, as one device does.
    """
    address = free_address()
    both = [start(2, "tests.joint_process", address, str(i)) for i in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in both]
    ours = ("reward ", "{", "the iteration", "no error")
    first, second = ([line for line in text.splitlines() if line.startswith(ours)] for text in printed)
    assert first[:2] == [
        f"reward {name!r} failed on process 1: see the error message of that process." for name in ("raises", "is_not_finite")
    ], printed
    assert "raised RuntimeError" in second[0] and "returned inf for sample 0" in second[1]
    assert first[2:] == ["{0: [0.0], 1: [6.0]}", "the iteration of one device"], printed
    assert second[2:] == ["{2: [12.0], 3: [18.0]}", "the iteration of one device"], printed


def test_two_processes_equal_one(tmp_path, whole):
    """A run with a replay buffer by two processes of two devices each, with parameters divided, and by one on one device."""
    joint = [
        "--devices.distributed",
        "--devices.coordinator",
        free_address(),
        "--devices.processes",
        "2",
        "--devices.fsdp",
        "2",
    ]
    run = ("tests.killed", "never", "--out", str(tmp_path / "two"), *joint)
    both = [start(2, *run, "--devices.process", str(i)) for i in range(2)]
    output = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    assert "4 devices (cpu) of 2 process(es)" in output[0] and "batch 24 = 6 each" in output[0]
    found = parameters(tmp_path / "two")
    for name, expected in parameters(whole).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-5)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "two", whole)]
    assert metrics[0]["reward"] == pytest.approx(metrics[1]["reward"], rel=1e-3)
