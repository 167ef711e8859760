"""Steps of one or several runs on the same batches, on a GPU as one CUDA graph.

Launching a step's thousands of small kernels one by one takes the host longer than they take the device. A graph is
launched as one; several runs in it are branches that the device may compute at the same time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from learner import Learner

EAGER_STEPS = 3
"""Steps before the graph is captured: in them libraries choose their kernels and momentum comes to be. They count as
steps. The exits' loss, which reads its sums from the device at its every 50th call, the first included, doesn't in
the next one."""

CAPTURES = ("branches", "chain", "off")

Prepare = Callable[[torch.Tensor], torch.Tensor]


class Steps:
    """Steps on batches of one shape.

    Args:
        learners: The runs.
        prepare: From bytes (B, C, H, W) to the network's input; in the graph with the rest.
        shape: A batch's shape (B, C, H, W).
        device: Where the runs are.
        capture: ``"branches"``: a graph in which the runs' steps are side by side; ``"chain"``: one after the other;
            ``"off"``: no graph, as always on the CPU.

    Raises:
        ValueError: If ``capture`` is something else, or the networks are compiled into graphs of their own.
    """

    def __init__(
        self,
        learners: Sequence[Learner],
        prepare: Prepare,
        shape: tuple[int, ...],
        device: torch.device,
        capture: str = "branches",
    ):
        if capture not in CAPTURES:
            raise ValueError(f"capture is {capture!r}; choose one of {', '.join(CAPTURES)}.")
        self.captures = capture != "off" and device.type == "cuda"
        if self.captures and any(learner.args.torchcompile_mode for learner in learners):
            raise ValueError("torchcompile_mode would put graphs into the graph; leave it out, or give --capture off.")
        self.learners, self.prepare, self.device = learners, prepare, device
        self.images = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.target = torch.zeros(shape[0], dtype=torch.long, device=device)
        self.stream: torch.cuda.Stream | None = None
        self.branches: list[torch.cuda.Stream | None] = [None] * len(learners)
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # a graph cannot be captured on the default one
            if capture == "branches":
                self.branches[1:] = [torch.cuda.Stream(device) for _ in learners[1:]]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """What everything that touches the runs' tensors happens in: the stream of the steps, if there is one."""
        if self.stream is None:
            yield
            return
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)  # weights and images were put there by the other one
        with torch.cuda.stream(self.stream):
            yield
        before.wait_stream(self.stream)

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> None:
        """Step on bytes (B, C, H, W) and labels (B,); in :meth:`on_stream`. Does not wait for the device."""
        self.images.copy_(images, non_blocking=True)
        self.target.copy_(target, non_blocking=True)
        if self.captures and self.graph is None and self.eager_steps == EAGER_STEPS:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._update_all()
            self.eager_steps += 1
        for learner in self.learners:
            learner.after_update()

    def _capture(self) -> None:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with ExitStack() as during:
            for learner in self.learners:
                during.enter_context(learner.rates_of_the_device())
            during.enter_context(torch.cuda.graph(graph, stream=self.stream))
            self._update_all()
        self.graph = graph

    def _update_all(self) -> None:
        """One step of every run; a branch begins when the batch is ready, and the next step when all have ended."""
        x = self.prepare(self.images)
        for learner, branch in zip(self.learners, self.branches, strict=True):
            if branch is None:
                continue
            branch.wait_stream(self.stream)
            with torch.cuda.stream(branch):
                learner.update(x, self.target)
        for learner, branch in zip(self.learners, self.branches, strict=True):
            if branch is None:
                learner.update(x, self.target)
        for branch in filter(None, self.branches):
            self.stream.wait_stream(branch)
