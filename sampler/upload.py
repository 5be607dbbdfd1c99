"""Host arrays to the device without waiting for it.

Used by everything in sampler/ and models/ that hands a step its inputs. A copy from pageable memory makes the host wait
for the stream; one from pinned memory does not, and torch keeps a pinned block until the copy that reads it is done.
"""

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a tensor on `device` with the array's content; on the CPU it may alias the array."""
    if device.type == "cpu":
        return torch.from_numpy(array)
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
