"""Writes a GGUF of noise with the block shapes of a 135M model (d 576, 9/3 heads of 64, MLP 1536).

python3 model.py LAYERS TYPE FILE; two such files that differ in LAYERS let one block be counted.
"""
import random
import struct
import sys

LAYERS, TYPE, FILE = int(sys.argv[1]), sys.argv[2], sys.argv[3]
D, HEADS, KV, HEAD, FF, VOCAB = 576, 9, 3, 64, 1536, 64
F32 = 0
# ggml's id, bytes a block of 32, and where the block's halves lie
TYPES = {"Q4_0": (2, 18, [0]), "Q4_1": (3, 20, [0, 2]), "Q8_0": (8, 34, [0])}

noise = random.Random(1)
tensors = []


def matrix(name, rows, cols):
    kind, size, halves = TYPES[TYPE]
    data = bytearray(noise.randbytes(rows * cols // 32 * size))
    for block in range(0, len(data), size):
        for i, at in enumerate(halves):
            data[block + at : block + at + 2] = struct.pack("<e", 0.005 if i == 0 else -0.0375)
    tensors.append((name, [cols, rows], kind, bytes(data)))


def norm(name):
    tensors.append((name, [D], F32, struct.pack("<f", 1.0) * D))


matrix("token_embd.weight", VOCAB, D)
for layer in range(LAYERS):
    norm(f"blk.{layer}.attn_norm.weight")
    norm(f"blk.{layer}.ffn_norm.weight")
    for name, rows, cols in [
        ("attn_q", HEADS * HEAD, D), ("attn_k", KV * HEAD, D), ("attn_v", KV * HEAD, D),
        ("attn_output", D, HEADS * HEAD), ("ffn_gate", FF, D), ("ffn_up", FF, D), ("ffn_down", D, FF),
    ]:
        matrix(f"blk.{layer}.{name}.weight", rows, cols)
norm("output_norm.weight")


def text(s):
    return struct.pack("<Q", len(s)) + s.encode()


metadata = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
for key, value in [
    ("context_length", 512), ("embedding_length", D), ("block_count", LAYERS),
    ("feed_forward_length", FF), ("attention.head_count", HEADS), ("attention.head_count_kv", KV),
    ("attention.key_length", HEAD), ("attention.value_length", HEAD), ("rope.dimension_count", HEAD),
]:
    metadata.append(text(f"llama.{key}") + struct.pack("<II", 4, value))
for key, value in [("rope.freq_base", 10000.0), ("attention.layer_norm_rms_epsilon", 1e-5)]:
    metadata.append(text(f"llama.{key}") + struct.pack("<If", 6, value))

head, data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(metadata), b""
for name, dims, kind, content in tensors:
    shape = struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    head += text(name) + shape + struct.pack("<IQ", kind, len(data))
    data += content + bytes(-len(content) % 32)
with open(FILE, "wb") as file:
    file.write(head + bytes(-len(head) % 32) + data)
