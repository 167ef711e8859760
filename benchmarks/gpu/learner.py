"""One run as train.py builds it: network, loss, optimizer, schedule, moving average, checkpoints."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    LogitDistillationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver, random_seed, unwrap_model
from torch import nn

import timm_dfs  # noqa: F401  teaches the task the exits' loss
from timm_dfs.training.run import read_run

WITHOUT_EFFECT = {"device", "workers", "val_interval", "checkpoint_hist", "torchcompile", "torchcompile_mode"}
"""Settings in which a run may differ from the checkpoint that it goes on from: none changes what is trained."""


class Learner:
    """A run's state, and its step on a batch.

    Args:
        args: Its recipe.
        device: Where it trains.
        updates_per_epoch: Batches in an epoch.
        folder: For its checkpoints, ``last.pth.tar`` among them; one that is there is resumed.

    Attributes:
        epoch: Epochs finished.
        updates: Steps done.
        epochs: Epochs of the whole schedule.

    Raises:
        ValueError: If the checkpoint was trained by another recipe.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, updates_per_epoch: int, folder: Path):
        self.args, self.device, self.updates_per_epoch = args, device, updates_per_epoch
        random_seed(args.seed, 0)
        self.model = timm.create_model(
            args.model,
            in_chans=args.in_chans or 3,
            num_classes=args.num_classes,
            drop_rate=args.drop,
            global_pool=args.gp,
            **args.model_kwargs,
        )
        args.num_classes = self.model.num_classes
        self.model.to(device)
        if args.channels_last:
            self.model.to(memory_format=torch.channels_last)
        criterion = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
        self.task = self._task(criterion)
        self.optimizer = create_optimizer_v2(self.model, **optimizer_kwargs(args), **args.opt_kwargs)
        last = folder / "last.pth.tar"
        self.epoch = self._resume(last) if last.is_file() else 0
        if device.type == "cuda":  # the fused step alone takes its rate from the device, as a graph needs it
            for group in self.optimizer.param_groups:
                group.update(fused=True, foreach=False)
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay)
            if self.epoch:
                load_task_ema_checkpoint(self.task, str(last))
        if args.torchcompile:
            self.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        self.saver = CheckpointSaver(
            model=self.task.get_trainable_module(),
            optimizer=self.optimizer,
            args=args,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            max_history=args.checkpoint_hist,
            task=self.task,
        )
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
        )
        self.updates = self.epoch * updates_per_epoch
        if self.epoch:
            self.saver.load_state_dict_from_checkpoint(str(last))
            if args.sched_on_updates:
                self.scheduler.step_update(self.updates)
            else:
                self.scheduler.step(self.epoch)
        self.rates = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        self._tell_rates()
        self.loss = torch.zeros((), device=device)
        self.right = torch.zeros(self.model.num_exits, device=device)

    def _task(self, criterion: nn.Module) -> ClassificationTask | LogitDistillationTask:
        args = self.args
        if args.kd_model_name is None:
            return ClassificationTask(self.model, criterion, device=self.device, verbose=False)
        task = LogitDistillationTask(
            self.model,
            args.kd_model_name,
            criterion,
            loss_type=args.kd_loss_type,
            distill_loss_weight=args.distill_loss_weight,
            task_loss_weight=args.task_loss_weight,
            temperature=args.kd_temperature,
            device=self.device,
            verbose=False,
        )
        teacher = task.teacher

        def normalised(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
            return (x * std + mean - teacher.mean_kd) / teacher.std_kd

        # timm's asks the device first whether the two normalisations are equal, which no graph holds.
        teacher.normalize_input = normalised
        return task

    def _resume(self, last: Path) -> int:
        before, now = read_run(last).arguments, vars(self.args)
        other = [
            f"{key}={before.get(key)} instead of {now.get(key)}"
            for key in sorted((before.keys() | now.keys()) - WITHOUT_EFFECT)
            if before.get(key) != now.get(key)
        ]
        if other:
            raise ValueError(f"{last} was trained with {', '.join(other)}; take that recipe, or another --output.")
        epoch = resume_task_checkpoint(self.task, str(last), optimizer=self.optimizer)
        for parameter, state in self.optimizer.state.items():
            if (buffer := state.get("momentum_buffer")) is not None:  # in the memory format that a fused step wants
                state["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
        return int(epoch or 0)

    def update(self, x: torch.Tensor, target: torch.Tensor) -> None:
        """One step of train.py's, loss and right answers added up on the device.

        Args:
            x: Normalised images (B, C, H, W).
            target: Labels (B,).
        """
        # Without a cache of cast weights, which a graph would not refill.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp, cache_enabled=False):
            result = self.task(x, target)
        result["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.task.update_ema(step=self.updates + 1)
        self.loss += result["loss"].detach()
        answers = torch.stack([logits.detach().argmax(-1) for logits in result["output"] if logits.ndim == 2])
        self.right += (answers == target).float().mean(1)

    @contextmanager
    def rates_of_the_device(self) -> Iterator[None]:
        """The optimizer reads its rates from tensors, as long as its step is captured; a graph would keep numbers."""
        given = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(self.optimizer.param_groups, given, strict=True):
                group["lr"] = rate

    def after_update(self) -> None:
        """Go on in the schedule."""
        self.updates += 1
        self.scheduler.step_update(self.updates)
        self._tell_rates()

    def _tell_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            rate.fill_(group["lr"])

    def end_epoch(self) -> dict[str, float]:
        """Means of the epoch's loss and right answers, which start again; waits for the device."""
        loss = self.loss.item() / self.updates_per_epoch
        right = (100 * self.right / self.updates_per_epoch).tolist()
        self.loss.zero_()
        self.right.zero_()
        self.epoch += 1
        return dict(loss=loss, **{f"top1_of_exit_{k}": value for k, value in enumerate(right)})

    def save(self, metric: float) -> None:
        """Write a checkpoint of the epoch just finished."""
        self.saver.save_checkpoint(self.epoch - 1, metric)

    def end_validation(self, metric: float | None) -> None:
        """Go on in a schedule of epochs."""
        self.scheduler.step(self.epoch, metric)
        self._tell_rates()

    def networks(self) -> dict[str, nn.Module]:
        """The trained network, and after it its moving average if there is one."""
        found = {"": unwrap_model(self.task.get_trainable_module())}
        if self.args.model_ema:
            found["ema"] = unwrap_model(self.task.get_trainable_module(ema=True))
        return found
