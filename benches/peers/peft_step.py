"""Time one training step of PyTorch + PEFT at the shape of SmolLM2-135M.

The model has random weights, so nothing is downloaded: the time of a step depends on shapes and types,
not on values. One JSON object goes to stdout; everything else goes to stderr.

    python peft_step.py --batch 1 --seq 256 --dtype f32

A step is: forward, mean cross-entropy over all next-token positions, backward, AdamW update of the
adapter, gradients cleared. Tokens per second count batch x seq input tokens per step. Peak resident
memory covers the whole process, as the kernel reports it, so it holds the interpreter, the libraries
and the base weights as well as the training state.
"""

import argparse
import json
import resource
import statistics
import sys
import time

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 49152
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1, help="sequences per step (default 1)")
    parser.add_argument("--seq", type=int, default=256, help="tokens per sequence (default 256)")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="type of the base weights (default f32)")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--grad-checkpoint", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch's kernels (default 2)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps (default 8)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before them (default 2)")
    parser.add_argument("--rank", type=int, default=8, help="adapter rank (default 8)")
    parser.add_argument("--alpha", type=int, default=16, help="adapter alpha (default 16)")
    args = parser.parse_args()
    for name in ("batch", "threads", "steps", "rank", "alpha"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.seq < 2:
        parser.error("--seq must be at least 2: a lone token has no next token to predict")
    if args.warmup < 0:
        parser.error("--warmup must not be negative")
    return args


def base_model(seq: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama with SmolLM2-135M's shape and random weights, in `dtype`."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=max(seq, 2048),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        use_cache=False,
    )
    # Built in the wanted type at once: converting afterwards would raise the peak by a second copy.
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def adapted_model(args: argparse.Namespace) -> peft.PeftModel:
    """The base with a LoRA or DoRA adapter on every linear layer of every block, ready to train."""
    base = base_model(args.seq, DTYPES[args.dtype])
    if args.grad_checkpoint:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=0.0,
        target_modules=ALL_LINEAR,
        use_dora=args.dora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    model.train()
    return model


def timed_steps(model: peft.PeftModel, args: argparse.Namespace) -> list[float]:
    """Seconds of each step after the warm-up."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4)
    tokens = torch.randint(0, VOCAB, (args.batch, args.seq), generator=torch.Generator().manual_seed(1))
    seconds = []
    for step in range(args.warmup + args.steps):
        started = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        elapsed = time.perf_counter() - started
        print(f"step {step}: loss {loss.item():.4f}, {elapsed:.3f} s", file=sys.stderr)
        if step >= args.warmup:
            seconds.append(elapsed)
    return seconds


def peak_rss_mib() -> float:
    """Highest resident size of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = adapted_model(args)
    seconds = timed_steps(model, args)
    rates = [args.batch * args.seq / s for s in seconds]
    report = {
        "system": "pytorch+peft",
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "method": "dora" if args.dora else "lora",
        "dtype": args.dtype,
        "batch": args.batch,
        "seq": args.seq,
        "rank": args.rank,
        "alpha": args.alpha,
        "grad_checkpoint": args.grad_checkpoint,
        "threads": args.threads,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens_per_second_median": round(statistics.median(rates), 2),
        "tokens_per_second": [round(r, 2) for r in rates],
        "peak_rss_mib": round(peak_rss_mib(), 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
