"""Run by a test: logits of mlx-lm's models in folders, and mlx's own quantization of matrices. Imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.utils import load_model


def main(root: Path) -> None:
    ids = mx.array(np.load(root / "ids.npy"))
    for folder in sorted(path.parent for path in root.glob("*/config.json")):
        model, _ = load_model(folder)  # strict
        np.save(folder / "logits.npy", np.array(model(ids).astype(mx.float32)))
    weight = mx.array(np.load(root / "weight.npy")).astype(mx.bfloat16)
    for bits in (2, 4, 8):
        for group in (32, 64):
            parts = mx.quantize(weight, group_size=group, bits=bits)
            whole = mx.dequantize(*parts, group_size=group, bits=bits).astype(mx.float32)
            codes, scales, biases = (np.array(part.astype(mx.float32) if i else part) for i, part in enumerate(parts))
            np.savez(root / f"quantized-{bits}-{group}.npz", codes=codes, scales=scales, biases=biases, whole=whole)
    _, tokenizer = load(root / "talks")
    (root / "ids.json").write_text(json.dumps(tokenizer.encode("Where is the cat?")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
