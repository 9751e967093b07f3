"""Products of every kind with the CUDA kernels, on small layers: what scripts/sanitize.sh runs under compute-sanitizer."""

import itertools

import torch

from lutq.config import LayerConfig
from lutq.cuda import multiply, prepack
from lutq.trial import random_packed

# Every mode of every kernel.
MATRIX = (
    (1, torch.float16),
    (3, torch.float32),
    (7, torch.bfloat16),
    (12, torch.float16),
    (20, torch.bfloat16),
    (40, torch.float16),
    (200, torch.float16),
)


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    cases = 0
    for bits, (grid, offsets), (N, K, group) in itertools.product(
        (1, 2, 3, 4),
        (("bcq", True), ("uniform", True)),
        ((80, 1280, 128), (33, 1100, 32)),
    ):
        layer = LayerConfig(bits, group, grid, offsets)
        ready = prepack(random_packed(N, K, layer, device), layer)
        for M, dtype in MATRIX:
            x = torch.randn(M, K, device=device).to(dtype)
            multiply(x, ready, None, N, layer)
            cases += 1
    torch.cuda.synchronize()
    print(f"{cases} cases")


if __name__ == "__main__":
    main()
