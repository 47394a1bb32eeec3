"""The same rollout and update in PyTorch with diffusers' U-Net, from the same files; needs the extra `benchmark`.

PyTorch gets the recorded noise, so it draws none, and its fused Adam. Images lie as `[b, h, w, c]` in memory (channels last).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from flax import nnx

from ctrl_diffusion.stable_diffusion import UNet, load_network

from .unet import CLIP, KL_WEIGHT, LEARNING_RATE, MAX_NORM, TIMESTEPS, Coefficients, Recorded


class Data(NamedTuple):
    """The recorded iteration on PyTorch's device."""

    start: torch.Tensor
    noise: torch.Tensor
    rows: dict[str, torch.Tensor]
    order: torch.Tensor
    c: Coefficients


def choose_device(platform: str) -> torch.device:
    """PyTorch's name for JAX's platform; `ValueError` if this PyTorch cannot use it."""
    if platform == "cpu":
        return torch.device("cpu")
    if platform == "gpu" and torch.cuda.is_available():
        return torch.device("cuda")
    raise ValueError(f"this PyTorch ({torch.__version__}) sees no {platform.upper()}, on which JAX runs")


def set_precision(tf32: bool) -> None:
    """Whether float32 products may be rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def load(folder: Path, device: torch.device) -> UNet2DConditionModel:
    """The network of a folder in diffusers' layout."""
    unet: Any = UNet2DConditionModel.from_pretrained(folder, use_safetensors=True)
    return unet.to(device, memory_format=torch.channels_last).eval()


def as_tensors(recorded: Recorded, c: Coefficients, device: torch.device) -> Data:
    """`[..., h, w, c]` becomes `[..., c, h, w]`."""

    def put(v, image=False):
        array = np.array(v)
        if image:
            array = np.ascontiguousarray(np.moveaxis(array, -1, -3))
        return torch.from_numpy(array).to(device)

    rows = recorded.rows
    images = {name: put(getattr(rows, name), True) for name in ("x", "noise", "a_old", "a_ref")}
    numbers = {"j": put(rows.j).long(), "policy_target": put(rows.policy_target)}
    return Data(
        put(recorded.path.x[0], True), put(recorded.path.noise, True), images | numbers, put(recorded.order).long(),
        Coefficients(*map(put, c)),
    )  # fmt: skip


def network(unet) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`v(x, t)`, attending to one token of zeros."""
    width = unet.config.cross_attention_dim

    def v(x, t):
        return unet(x, TIMESTEPS * (1 - t), x.new_zeros(x.shape[0], 1, width), return_dict=False)[0]

    return v


def rollout(v: Callable, data: Data) -> torch.Tensor:
    """States `[n + 1, b, c, h, w]`."""
    c, x = data.c, data.start
    states = [x]
    with torch.inference_mode():
        for i in range(len(c.t)):
            x0 = c.alpha[i] * x - c.sigma[i] * v(x, c.t[i].expand(x.shape[0]))
            x = c.keep[i] * x + c.gain[i] * x0 + c.std[i] * data.noise[i]
            states.append(x)
        return torch.stack(states)


def surrogate(v: Callable, c: Coefficients, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of `benchmark_unet.surrogate`."""
    alpha, sigma, scale = (number[rows["j"]][:, None, None, None] for number in (c.alpha, c.sigma, c.scale))
    a = -rows["x"] - alpha / sigma * v(rows["x"], c.t[rows["j"]])
    z, z_ref = scale * (a - rows["a_old"]), scale * (a - rows["a_ref"])
    log_rho = (z * rows["noise"] - 0.5 * z**2).sum((1, 2, 3))
    rho, kl = log_rho.exp(), 0.5 * (z_ref**2).sum((1, 2, 3))
    gain = torch.minimum(rho * rows["policy_target"], rho.clamp(1 - CLIP, 1 + CLIP) * rows["policy_target"])
    return len(c.t) * (KL_WEIGHT * kl - gain).mean()


class Rival:
    """One way to run PyTorch: eager, or compiled. `behaviour` samples, `learner` is updated; both are folders of weights."""

    def __init__(self, behaviour: Path, learner: Path, data: Data, compiled: bool):
        self.data, self.device = data, data.start.device
        self.learner = load(learner, self.device)
        self.optimizer = torch.optim.Adam(self.learner.parameters(), lr=LEARNING_RATE, fused=True)
        sampling, training = network(load(behaviour, self.device)), network(self.learner)

        def loss(rows):
            return surrogate(training, data.c, rows)

        self.sampling = torch.compile(sampling, dynamic=False) if compiled else sampling
        self.loss = torch.compile(loss, dynamic=False) if compiled else loss

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sample(self) -> torch.Tensor:
        """The recorded paths once more."""
        states = rollout(self.sampling, self.data)
        self.wait()
        return states

    def update(self, i: int) -> torch.Tensor:
        """One step on minibatch `i`."""
        some = {name: v[self.data.order[i]] for name, v in self.data.rows.items()}
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(some)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), MAX_NORM)
        self.optimizer.step()
        self.wait()
        return loss

    def ends(self) -> np.ndarray:
        """Final states `[b, h, w, c]`."""
        return self.sample()[-1].cpu().numpy().transpose(0, 2, 3, 1)

    def loss_and_gradient(self, folder: Path) -> tuple[float, Any]:
        """On the first minibatch, the gradient in JAX's layout: written to `folder` as if it were a network, and loaded."""
        some = {name: v[self.data.order[0]] for name, v in self.data.rows.items()}
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(some)
        loss.backward()
        self.learner.save_config(folder)
        gradients = {name: p.grad.contiguous().cpu() for name, p in self.learner.named_parameters() if p.grad is not None}
        safetensors.torch.save_file(gradients, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        return loss.item(), nnx.state(load_network(UNet, folder))


def load_as(folder: Path, precision: str, device: torch.device) -> UNet2DConditionModel:
    """The network of a folder, computing in this precision."""
    unet: Any = load(folder, device)
    return unet if precision == "float32" else unet.to(getattr(torch, precision))


def guided_sampling(
    unet: UNet2DConditionModel, chain: Any, start: Any, noise: Any, guidance: float, compiled: bool = False
) -> Callable[[], np.ndarray]:
    """`call()`: final latents `[b, h, w, c]` of the `Chain` of `experiments.benchmark_text_to_image`."""
    dtype, device = unet.dtype, unet.device
    predict: Any = torch.compile(unet, dynamic=False) if compiled else unet

    def put(v: Any, image: bool = False) -> torch.Tensor:
        array = np.array(v)
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, -3)) if image else array).to(device)

    timesteps, keep, gain, std = (put(v) for v in chain[:-1])
    contexts, x0, xi = put(chain.contexts).to(dtype), put(start, True), put(noise, True)

    def call() -> np.ndarray:
        x = x0
        with torch.inference_mode():
            for i in range(len(keep)):
                both = torch.cat([x, x]).to(dtype, memory_format=torch.channels_last)
                text, empty = predict(both, timesteps[i], contexts, return_dict=False)[0].float().chunk(2)
                x = keep[i] * x + gain[i] * (empty + guidance * (text - empty)) + std[i] * xi[i]
        return x.cpu().numpy().transpose(0, 2, 3, 1)

    return call


def versions() -> dict[str, Any]:
    """What PyTorch is here."""
    return {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
