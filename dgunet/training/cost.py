"""What a training step costs, known beforehand: its operations and its memory, from tensors without values."""

import copy
import weakref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dgunet.data.transforms import center_crop
from dgunet.model.network import DGUNet
from dgunet.training import optimizers
from dgunet.training.step import MeasureThenRestore


def count_operations(model: DGUNet, batch: int, height: int, width: int, backward: bool = True) -> int:
    """Floating-point operations of the matrix products and convolutions for images (batch, C, height, width).

    Of the forward pass, with a known degradation's measurement, and of the ``backward`` pass; not of the second forward
    pass that checkpointing takes.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = _without_values(model, fake)
    model.checkpointing = False
    with fake, FlopCounterMode(display=False) as counter:
        x = torch.empty(batch, model.channels, height, width, device=next(model.parameters()).device)
        estimates = MeasureThenRestore(model)(x)
        if backward:
            sum(x.sum() for x in estimates).backward()
    return counter.get_total_flops()


def step_memory(train_state, crop: int) -> int:
    """The most bytes that a process's tensors take during a training step: activations, weights, gradients, moments.

    They are PyTorch's own, not compiled. A GPU needs about a gigabyte more, for its context and its libraries.

    Args:
        train_state: a `TrainState`.
        crop: side of the training images.
    """
    optim, size = train_state.cfg.OPTIM, train_state.micro_batch_size
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model, loss = _without_values(train_state.model, fake), _without_values(train_state.loss, fake)
    with fake, LiveBytes() as live:
        parameters = [p for p in model.parameters() if p.requires_grad]
        averaged = [torch.empty_like(x) for x in model.state_dict().values()] if optim.EMA_DECAY else []
        live.add([model.state_dict(), averaged])
        optimizer = optimizers.make_optimizer(optim, parameters)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # which makes the moments
        optimizer.zero_grad()
        x = torch.empty(size, model.channels, crop, crop, device=train_state.device)
        x = x.contiguous(memory_format=train_state.memory_format)
        network = MeasureThenRestore(model.train())
        with train_state.autocast():
            estimates = network(x)
        loss(estimates, center_crop(x, *estimates[0].shape[-2:]), network.y).backward()
    return live.peak


def _without_values(module: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy whose parameters and buffers have shapes and types, but neither values nor memory."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: fake.from_tensor(x) for name, x in tensors.items() if x is not None})
    return module


class LiveBytes(TorchDispatchMode):
    """Within it: how many bytes the tensors that were made or `add`-ed take, ``now`` and at the ``peak``."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}  # of storages, which views share

    def add(self, tree):
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out


def matrix_rate(device: torch.device, dtype: torch.dtype | None, size: int = 0) -> float:
    """Floating-point operations per second of a product of large matrices (size, size), measured in a second.

    In float32 as cuDNN computes convolutions, on most GPUs with TF32.
    """
    from torch.utils.benchmark import Timer  # which warns where CUDA's compiler is and a GPU is not

    size = size or (8192 if device.type == "cuda" else 3072)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return 2 * size**3 / min(timer.blocked_autorange(min_run_time=1).times)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def peak_image_rate(train_state, crop: int) -> float | None:
    """Images per second at which training would reach the rate of plain matrix products on all GPUs; None on a CPU.

    None, too, where that cannot be known: a user's own module has operations that tensors without values do not go
    through, or the card is full.
    """
    device = train_state.device
    if device.type != "cuda":
        return None
    try:
        operations = count_operations(train_state.model, 1, crop, crop)
        return train_state.world * _rate_of_gpu(device, train_state.amp) / operations
    except Exception:
        return None


def _rate_of_gpu(device: torch.device, amp: torch.dtype | None) -> float:
    rate = matrix_rate(device, amp)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # the matrices are not the training's
    return rate
