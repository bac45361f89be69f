"""Peak extra memory of token_stats against full logits, value and gradients: python tests/memory.py

At the default size (4096 tokens of Qwen2.5-0.5B) the full-logits way takes over 10 GB. Each way runs in a process of its own.
On CUDA (--device cuda) the peak is the allocator's, on the CPU the growth of the largest resident set.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from energy import TokenStats, token_stats  # noqa: E402


def full_logits(hidden, weight, targets, chunk_size=None):
    """What most trainers do: all logits, their log-softmax, and from them the three statistics."""
    logits = (hidden @ weight.T).float()
    logp = logits.log_softmax(-1)
    return TokenStats(logp.gather(-1, targets[:, None]).squeeze(-1), -logits.logsumexp(-1), -(logp.exp() * logp).sum(-1))


def peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


def measure(way, args) -> None:
    def run(n: int, vocabulary: int) -> tuple[float, float]:
        hidden = torch.randn(n, args.width, device=args.device, requires_grad=True)
        weight = torch.randn(vocabulary, args.width, device=args.device, requires_grad=True)
        targets = torch.randint(0, vocabulary, (n,), device=args.device)
        before, began = peak(args.device), time.perf_counter()
        stats = way(hidden, weight, targets, chunk_size=args.chunk_size)
        (stats.logprob + stats.energy + stats.entropy).sum().backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, peak(args.device) - before

    run(64, 1024)  # the libraries set themselves up
    seconds, extra = run(args.tokens, args.vocabulary)
    print(f"{way.__name__:12} {seconds:6.1f} s, extra {extra:8.3f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk-size", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--way", choices=["token_stats", "full_logits"])
    args = parser.parse_args()
    if args.way:
        measure({"token_stats": token_stats, "full_logits": full_logits}[args.way], args)
    else:
        for way in ("token_stats", "full_logits"):
            subprocess.run([sys.executable, *sys.argv, "--way", way], check=True)
