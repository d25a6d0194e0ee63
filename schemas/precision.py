"""Select the precision in which a device runs networks."""

from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]


def pick_precision(name: str, device: torch.device) -> Precision:
    """Decide `auto`: bf16 where the device has instructions for it, else fp32.

    On two cores with AVX512-BF16, a step of ResNet-18 on 112-pixel crops (one forward with
    gradient, two without) took half the time in bf16 channels_last that it took in fp32. Without
    the instructions PyTorch falls back to a slow convolution: MobileNetV2 at 224 pixels processed
    2.7 images/s on a core with AVX2 in bf16, and 34 in fp32.
    """
    if name != "auto":
        return "bf16" if name == "bf16" else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which networks run at this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
