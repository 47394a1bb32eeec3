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


def killed(out, point, devices=1):
    """A run that ends at a point."""
    command = [sys.executable, "-m", "tests.killed", str(out), point]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(devices, flags()), capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Parameters of a run with a replay buffer that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    assert killed(out / "run", "never") == (0, ANY)
    return parameters(out / "run")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a run after SIGKILL in a rollout, in an update and while a checkpoint was written."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    for point in ("rollout", "update", "checkpoint"):
        assert killed(out, point) == (-signal.SIGKILL, ANY)
    return out


def test_an_interrupted_run_ends_bit_for_bit_as_if_it_had_not_been(tmp_path, whole, interrupted):
    """Last by a full disk: no file may grow beyond 8 kB; what was written before is used."""
    run = shutil.copytree(interrupted, tmp_path / "run")
    code, message = killed(run, "disk")
    expected = "error: a checkpoint cannot be written to .*File too large.*MiB are free there"
    assert code == 1 and re.search(expected, message), message
    assert killed(run, "never") == (0, ANY)
    for name, found in parameters(run).items():
        np.testing.assert_array_equal(found, whole[name])
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row["phase"] == "finetune"] == list(range(6))


def test_a_run_goes_on_with_other_devices(tmp_path, whole, interrupted):
    """Checkpoints of one device, the replay buffer in them, are restored on four."""
    run = shutil.copytree(interrupted, tmp_path / "run")
    assert killed(run, "never", devices=4) == (0, ANY)
    for name, found in parameters(run).items():
        np.testing.assert_allclose(found, whole[name], rtol=1e-3, atol=1e-5)


TINY = "--steps 4 --pretrain-steps 20 --pretrain-batch 32 --width 16 --depth 1 --iterations 2 --batch 32 --minibatches 2 --epochs 1"
TINY += " --reference-samples 64 --evaluation-samples 64 --evaluate-every 2 --checkpoint-every 1"


def start(devices, *command):
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment(devices, flags()),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


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


def test_two_processes_equal_one(tmp_path):
    """The whole experiment by two processes of two devices each, with parameters divided, and by one on one device: the same model."""

    def run(name, devices, *options):
        return start(devices, "experiments.digits", "--out", str(tmp_path / name), *TINY.split(), *options)

    alone = run("one", 1)
    joint = [
        "--devices.distributed",
        "--devices.coordinator",
        free_address(),
        "--devices.processes",
        "2",
        "--devices.fsdp",
        "2",
    ]
    both = [run("two", 2, *joint, "--devices.process", str(i)) for i in range(2)]
    output = [process.communicate()[0] for process in (alone, *both)]
    assert [process.returncode for process in (alone, *both)] == [0, 0, 0], output
    assert "4 devices (cpu) of 2 process(es)" in output[1]
    assert "batch 32 = 8 each" in output[1]
    one, two = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-5)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[1]["reward"] == pytest.approx(metrics[0]["reward"], rel=1e-3)
