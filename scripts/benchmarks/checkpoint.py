"""bench.py checkpoint: how long a save holds training up, and how much a step suffers while the files are written."""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch

from config import Config
from decent import Checkpoints, DecentDP, World
from optim import AccumAdamW
from scripts.benchmarks.gpt import build_gpt, training_step
from scripts.benchmarks.timing import Arms, Result, alternate, compare


def measure(args: argparse.Namespace) -> list[Result]:
    """Return the ms of a save, of a copy of as many bytes, and of a training step with and without a write beside it.

    Between two saves the files are waited for, which is not measured.
    """
    world = World.from_env()
    with world.connected(), tempfile.TemporaryDirectory() as folder:
        gpt = build_gpt(args).to(world.device)
        model, optimizer = DecentDP(gpt, "complete", local_world_size=1), AccumAdamW(gpt.parameters())
        tokens = torch.randint(args.vocab_size, (8, args.context_length), device=world.device)
        step = training_step(gpt, model, optimizer, tokens)
        step()
        checkpoints = Checkpoints(Path(folder), world, model, {"optimizer": optimizer}, Config())
        state = [*gpt.parameters(), *(t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))]
        steps_saved = itertools.count()
        arms: Arms = {
            "copy of the state": lambda: [t.detach().to("cpu", copy=True) for t in state],
            "save": lambda: checkpoints.save(next(steps_saved)),
            "step while it is written": step,
            "step": step,
        }
        blocks = itertools.count()

        def wait_for_files() -> None:
            """Wait before the first arm and the last, so that nothing is written beside them."""
            if next(blocks) % len(arms) in (0, 3):
                checkpoints.wait()

        with checkpoints.running():
            times_s = alternate(arms, args.rounds, before=wait_for_files)
        print(f"state: {sum(t.nbytes for t in state) / 1e6:.0f} MB")
        return compare(times_s, base="step")
