"""For `make test-vllm` only: two operators that torchvision's GPU build looks for, so that it loads beside a CPU torch.

vLLM looks at Qwen3-VL in a process of its own, hence a file that every Python of that environment reads when it starts.
"""

import torch

_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
