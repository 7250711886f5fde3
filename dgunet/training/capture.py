"""The training step as a CUDA graph: recorded once and then replayed, so that the CPU launches one graph, not kernels.

A step of a small network takes the CPU longer to launch, some 13,000 kernels, than the GPU to compute.
"""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dgunet.runtime.errors import UserError
from dgunet.training import optimizers

log = logging.getLogger("dgunet")

WARM_UP_STEPS = 3  # before recording: cuDNN chooses its algorithms, torch.compile compiles, Adam makes its moments
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile: they record CUDA graphs of their own


class CudaGraph:
    """A CUDA graph, and the stream that the steps before recording run on, as PyTorch wants it."""

    def __init__(self):
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def warm_up(self, step: Callable[[], None]):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, step: Callable[[], None]):
        """Record the kernels of a step, which are not computed."""
        # The thread that pins the loader's batches goes on using CUDA.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            step()

    def replay(self):
        self.graph.replay()


class CapturedStep:
    """`TrainState.compute_step`, computed some times as it is, then recorded, then replayed.

    A batch of another size than the recorded one is computed as it is. Where recording fails, so are all steps, and the
    log says why.

    Args:
        train_state: whose step it is.
        graph: records and replays.
    """

    def __init__(self, train_state, graph: CudaGraph):
        self.train_state, self.graph = train_state, graph
        self.warm_steps, self.failed = 0, False
        self.batch: tuple[Tensor, Tensor] | None = None  # where the recorded step reads its batch

    def __call__(self, input: Tensor, target: Tensor):
        state = self.train_state
        if self.batch is not None and all(map(_same_layout, self.batch, (input, target))):
            for kept, given in zip(self.batch, (input, target), strict=True):
                kept.copy_(given)
            self.graph.replay()
        elif self.batch is None and self.warm_steps >= WARM_UP_STEPS and state.is_averaging and not self.failed:
            self._record(input, target)
        else:
            self.graph.warm_up(lambda: state.compute_step(input, target))
            self.warm_steps += 1

    def _record(self, *batch: Tensor):
        state = self.train_state
        self.batch = tuple(x.clone() for x in batch)
        optimizers.use_tensor_rates(state.optimizer)
        try:
            self.graph.record(lambda: state.compute_step(*self.batch))
        except Exception as error:  # of any kind, also from a loss of the user's own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.info("SPEED.CAPTURE: the step cannot be recorded (%s); it is computed as it is", reason)
            self.batch, self.failed = None, True
            state.optimizer.zero_grad(set_to_none=True)  # half of a gradient, perhaps
            state.compute_step(*batch)
        else:
            self.graph.replay()


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def reason_not_to_capture(train_state) -> str:
    """Why a training's step cannot be recorded; empty if nothing is known that prevents it."""
    cfg = train_state.cfg
    if not _is_gpu(train_state.device):
        return "there is no CUDA GPU"
    if dist.is_initialized():
        return "several processes share their gradients"
    if cfg.OPTIM.NAME not in ("adam", "adamw"):
        return f"OPTIM.NAME {cfg.OPTIM.NAME} reads its learning rate on the CPU"
    if train_state.measured:
        return "the known degradation draws anew for each step, on the CPU"
    if train_state.compiled and cfg.SPEED.COMPILE_MODE in GRAPH_MODES:
        return f"SPEED.COMPILE_MODE {cfg.SPEED.COMPILE_MODE} records graphs of its own"
    return ""


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def make_captured_step(train_state) -> CapturedStep | None:
    """The captured step that SPEED.CAPTURE asks for; None for computing each step as it is.

    Raises:
        UserError: it is True, and the step cannot be recorded.
    """
    choice = train_state.cfg.SPEED.CAPTURE
    reason = reason_not_to_capture(train_state) if choice else ""
    if reason and choice is True:
        raise UserError(f"SPEED.CAPTURE True: {reason}; leave it at auto")
    if reason and _is_gpu(train_state.device):
        log.info("SPEED.CAPTURE: the step is not recorded, since %s", reason)
    return CapturedStep(train_state, CudaGraph()) if choice and not reason else None
