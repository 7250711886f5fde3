"""The training step as a CUDA graph: recorded once and then replayed, so that the CPU launches one graph, not kernels.

A step of a small network takes the CPU longer to launch, some 13,000 kernels, than the GPU to compute.
"""

import functools
import gc
import logging
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dgunet.runtime.errors import UserError
from dgunet.training import optimizers

log = logging.getLogger("dgunet")

WARM_UP_STEPS = 3  # before recording: cuDNN chooses its algorithms, torch.compile compiles, Adam makes its moments
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile: they record CUDA graphs of their own
# Of the GPU's memory, that `auto` lets a recorded step keep for itself: validations need some, too.
LARGEST_SHARE = 0.6


class CudaGraph:
    """A CUDA graph, and the stream that the steps before recording run on, as PyTorch wants it."""

    def __init__(self):
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def warm_up(self, step: Callable[[], None]):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def watch(self, step: Callable[[], None]) -> str:
        """`warm_up` with a step; why it cannot be recorded, if something in it makes the CPU wait for the GPU.

        That would not only end the recording: PyTorch's allocator and random generator would stay in its mode.
        """
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.warm_up(step)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
        return f"{waits[0].filename}:{waits[0].lineno} waits for the GPU" if waits else ""

    def record(self, step: Callable[[], None]):
        """Record the kernels of a step, which are not computed."""
        stream = torch.cuda.current_stream()
        gc.collect()  # not while recording: what it frees may be another graph
        gc.disable()
        try:
            # The thread that pins the loader's batches goes on using CUDA.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                step()
        except Exception as error:
            torch.cuda.set_stream(stream)  # which torch.cuda.graph does not, where ending the recording fails, too
            while error.__context__ is not None:
                error = error.__context__
            raise error
        finally:
            gc.enable()

    def replay(self):
        self.graph.replay()

    def share_of_memory(self) -> float:
        """Of the GPU's memory, what the steps so far have taken."""
        return torch.cuda.max_memory_allocated() / torch.cuda.mem_get_info()[1]


class CapturedStep:
    """`TrainState.compute_step`, computed some times as it is, then recorded, then replayed.

    A batch of another size than the recorded one is computed as it is. Where the step cannot be recorded, so are all
    steps, and the log says why.

    Args:
        train_state: whose step it is.
        graph: records and replays.
    """

    def __init__(self, train_state, graph: CudaGraph):
        self.train_state, self.graph = train_state, graph
        self.batch: tuple[Tensor, Tensor] | None = None  # where the recorded step reads its batch
        self.layout = None  # of the last batch
        self.warm_steps = 0  # with it, one after the other
        self.watched, self.failed = False, False

    def __call__(self, *batch: Tensor):
        layout = [(x.shape, x.stride(), x.dtype) for x in batch]
        step = functools.partial(self.train_state.compute_step, *batch)
        if self.batch is not None and layout == self.layout:
            for kept, given in zip(self.batch, batch, strict=True):
                kept.copy_(given)
            self.graph.replay()
            return
        if self.batch is not None or self.failed:
            self.graph.warm_up(step)
            return
        if layout != self.layout:
            self.layout, self.warm_steps, self.watched = layout, 0, False
        if self.watched:
            self._record(*batch)
        elif self.warm_steps >= WARM_UP_STEPS - 1 and self.train_state.is_averaging:
            self.watched = True
            if reason := self.graph.watch(step) or self._too_large():
                self._give_up(reason)
        else:
            self.graph.warm_up(step)
            self.warm_steps += 1

    def _too_large(self) -> str:
        share = self.graph.share_of_memory()
        large = share > LARGEST_SHARE and self.train_state.cfg.SPEED.CAPTURE == "auto"
        return f"it would keep {share:.0%} of the GPU's memory to itself; True does it" if large else ""

    def _give_up(self, reason: str):
        log.info("SPEED.CAPTURE: the step cannot be recorded (%s); it is computed as it is", reason)
        self.failed = True

    def _record(self, *batch: Tensor):
        state = self.train_state
        self.batch = tuple(x.clone() for x in batch)
        optimizers.use_tensor_rates(state.optimizer)
        try:
            with optimizers.capturable(state.optimizer):
                self.graph.record(lambda: state.compute_step(*self.batch))
        except Exception as error:  # of any kind, also from a loss of the user's own
            self._give_up((str(error).strip().splitlines() or [type(error).__name__])[0])
            self.batch = None
            state.optimizer.zero_grad(set_to_none=True)  # half of a gradient, perhaps
            state.compute_step(*batch)
        else:
            self.graph.replay()


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
