"""What an evaluation measures: the losses of the model that the module holds, the same one on all workers."""

from contextlib import closing

import torch
from torch import Tensor, nn

from config import Config
from data.loader import Split, TokenDataset, prefetch
from decent import World

IGNORED = -100  # a target that PyTorch's cross entropy leaves out of its mean


@torch.no_grad()
def evaluate(model: nn.Module, world: World, cfg: Config, dataset: TokenDataset) -> dict[str, float]:
    """Mean loss of each split: of val over all of it if eval_full is set, otherwise over the same eval_steps global
    batches in every evaluation."""
    model.eval()
    val = (
        whole_loss(model, world, cfg, dataset) if cfg.log.eval_full else sampled_loss(model, world, cfg, dataset, "val")
    )
    train = sampled_loss(model, world, cfg, dataset, "train")
    model.train()
    return dict(zip(("val", "train"), world.mean(torch.stack([val, train])).tolist(), strict=True))


def sampled_loss(model: nn.Module, world: World, cfg: Config, dataset: TokenDataset, split: Split) -> Tensor:
    """This worker's mean loss over its rows of eval_steps global batches, a float64 scalar."""
    n_micro_batches = cfg.train.n_micro_batches(world.world_size)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    size = cfg.train.global_batch_size
    steps, rows = range(cfg.log.eval_steps), world.rows(size)
    with closing(dataset.batches(split, steps, rows, size, device=world.device, evaluation=True)) as batches:
        for x, y in batches:
            for xs, ys in zip(x.chunk(n_micro_batches), y.chunk(n_micro_batches), strict=True):
                loss += model(xs, ys)[1]
    return loss / (cfg.log.eval_steps * n_micro_batches)


def whole_loss(model: nn.Module, world: World, cfg: Config, dataset: TokenDataset) -> Tensor:
    """This worker's part of the loss over all of val, a float64 scalar: the mean over the workers is that over targets.

    The workers take turns, a micro-batch each, through the windows in order. Some may have a turn less than others:
    nothing in here waits for another worker.
    """
    rows = cfg.train.rows_per_micro_batch(world.world_size)
    n_targets = dataset.n_targets("val")
    targets_each = rows * cfg.train.context_length
    firsts = range(world.rank * targets_each, n_targets, world.world_size * targets_each)  # target of each turn
    order = torch.arange(targets_each, device=world.device).view(rows, -1)  # (rows, T): as targets follow each other
    loss = torch.zeros((), dtype=torch.float64, device=world.device)

    def windows_of(turn: int) -> Tensor:
        return dataset.windows_in_order("val", firsts[turn] // cfg.train.context_length, rows)

    with closing(prefetch(windows_of, 0, len(firsts), device=world.device)) as batches:
        for first, (x, y) in zip(firsts, batches, strict=True):
            n = min(targets_each, n_targets - first)
            # Not fewer rows: with a shape of its own the last micro-batch would be compiled anew.
            loss += model(x, y.masked_fill(order >= n, IGNORED))[1].double() * n
    return loss * world.world_size / n_targets
