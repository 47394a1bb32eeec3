"""One of two processes of two devices each, run by `test_parallel.py`: what they judge and what they learn together.

A reward that fails on the second process alone, in two ways; one that does not; and an iteration that is that of one device.
"""

import sys

import jax
import numpy as np

import ctrl_diffusion as cd
from ctrl_diffusion.parallel import Layout, make_mesh, whole
from ctrl_diffusion.rewards import compute_rewards


def main(address: str, process: int) -> None:
    jax.distributed.initialize(address, 2, process)
    layout = Layout(make_mesh(), min_size=1)
    x = layout.put(np.arange(12, dtype=np.float32).reshape(4, 3), layout.batch)

    def raises(rows):
        if process == 1:
            raise RuntimeError("the judge is out")
        return rows[:, 0]

    def is_not_finite(rows):
        return np.where(process == 1, np.inf, rows[:, 0])

    for reward in (raises, is_not_finite):
        try:
            compute_rewards(cd.black_box(reward), x)
            print("no error")
        except cd.rewards.RewardError as error:
            print(error)
    doubled = compute_rewards(cd.black_box(lambda rows: 2 * rows[:, 0]), x)
    print({shard.index[0].start: shard.data.tolist() for shard in doubled.addressable_shards})

    from tests.parallel_cases import iteration, leaves  # which compute something: after the processes have met

    (alone, _), (joint, _) = (iteration("likelihood ratio", v) for v in (Layout(), layout))
    for a, b in zip(leaves(whole(joint)), leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    print("the iteration of one device")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
