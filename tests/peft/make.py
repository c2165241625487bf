"""Makes the golden files in golden/: a small random Llama as GGUF, and adapters that PEFT itself wrote.

Run with torch, transformers and peft (0.21.2 made the files that are checked in):

    python tests/peft/make.py                          # write golden/ anew
    ENGRAFT_PEFT_OUT=OUT cargo test -p engraft-runtime --test runtime -- exchange::
    python tests/peft/make.py check OUT/NAME NAME      # does PEFT load what we wrote, with NAME's logits?

The base's weights are numbers that F16 holds exactly, so the GGUF is the same model. Logits are those
of PEFT in float32 on fixed ids.
"""

import json
import pathlib
import struct
import sys

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = pathlib.Path(__file__).parent / "golden"
IDS = [1, 17, 5, 42, 42, 9, 63, 0, 30, 2, 11, 58]
LAST = 4  # positions whose logits are kept
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = dict(
    vocab_size=64, hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
)
ADAPTERS = {
    "lora": dict(r=2, lora_alpha=6, target_modules=ALL),
    "layers": dict(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    "patterns": dict(
        r=2, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"k_proj": 3, "layers.0.mlp.down_proj": 1},
        alpha_pattern={"^model.layers.1.self_attn.q_proj": 9, "k_proj": 4},
    ),
    "rslora": dict(r=4, lora_alpha=3, target_modules=["q_proj", "k_proj", "up_proj"], use_rslora=True),
    "dora": dict(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "o_proj"], use_dora=True),
}


def base():
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float().eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            if name.endswith("norm.weight"):
                w.copy_(1 + 0.2 * torch.randn_like(w))
            else:
                w.copy_(torch.randn_like(w) * (0.3 if "embed" in name else w.shape[1] ** -0.5))
            w.copy_(w.half().float())
    return model


def rotary(w, heads):
    """The rows of a query or key matrix in the order that llama-architecture GGUFs hold them."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, model):
    c = model.config
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}
    tensors = []
    for name, w in model.state_dict().items():
        w, parts = w.numpy(), name.split(".")
        if name == "lm_head.weight":
            continue
        if "q_proj" in name:
            w = rotary(w, c.num_attention_heads)
        if "k_proj" in name:
            w = rotary(w, c.num_key_value_heads)
        if parts[1] == "layers":
            name = f"blk.{parts[2]}.{names['.'.join(parts[3:-1])]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight",
                    "model.norm.weight": "output_norm.weight"}[name]
        tensors.append((name, w.astype(np.float32 if w.ndim == 1 else np.float16)))
    text = lambda s: struct.pack("<Q", len(s)) + s.encode()
    string = lambda s: struct.pack("<I", 8) + text(s)
    uint = lambda n: struct.pack("<II", 4, n)
    real = lambda x: struct.pack("<If", 6, x)
    meta = {
        "general.architecture": string("llama"), "general.name": string("golden"),
        "llama.context_length": uint(c.max_position_embeddings),
        "llama.embedding_length": uint(c.hidden_size), "llama.block_count": uint(c.num_hidden_layers),
        "llama.feed_forward_length": uint(c.intermediate_size),
        "llama.attention.head_count": uint(c.num_attention_heads),
        "llama.attention.head_count_kv": uint(c.num_key_value_heads),
        "llama.rope.freq_base": real(10000.0),
        "llama.attention.layer_norm_rms_epsilon": real(c.rms_norm_eps),
    }
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    out += b"".join(text(key) + value for key, value in meta.items())
    data = b""
    for name, w in tensors:
        out += text(name) + struct.pack("<I", w.ndim)
        out += b"".join(struct.pack("<Q", n) for n in reversed(w.shape))
        out += struct.pack("<IQ", 0 if w.dtype == np.float32 else 1, len(data))
        data += w.tobytes()
        data += b"\0" * (-len(data) % 32)
    path.write_bytes(out + b"\0" * (-len(out) % 32) + data)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, -LAST:].double().numpy()


def make():
    GOLDEN.mkdir(exist_ok=True)
    write_gguf(GOLDEN / "base.gguf", base())
    expected = {"ids": IDS, "base": [round(float(x), 6) for x in logits(base()).ravel()]}
    for name, settings in ADAPTERS.items():
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        torch.manual_seed(len(name))
        with torch.no_grad():
            for key, w in model.named_parameters():
                if "lora_B" in key:
                    w.copy_(0.1 * torch.randn_like(w))
                if "magnitude" in key:
                    w.copy_(w * (1 + 0.1 * torch.randn_like(w)))
        model.save_pretrained(GOLDEN / name)
        (GOLDEN / name / "README.md").unlink(missing_ok=True)
        expected[name] = [round(float(x), 6) for x in logits(model).ravel()]
    (GOLDEN / "logits.json").write_text(json.dumps(expected))


def check(folder, name):
    import warnings
    warnings.filterwarnings("error", message=".*(missing|unexpected).*")
    expected = np.array(json.loads((GOLDEN / "logits.json").read_text())[name])
    model = PeftModel.from_pretrained(base(), folder).eval()
    found = logits(model).ravel()
    effect = np.abs(found - logits(base()).ravel()).max()
    print(f"{folder}: max |difference| {np.abs(found - expected).max():.2e}, effect {effect:.2e}")


if __name__ == "__main__":
    check(*sys.argv[2:]) if sys.argv[1:2] == ["check"] else make()
