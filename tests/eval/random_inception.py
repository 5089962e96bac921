"""A file of seeded random weights in the names of torch-fidelity's Inception."""

from pathlib import Path
from unittest import mock

import torch


def write_random_inception(path: Path) -> Path:
    """Weights under which activations neither vanish nor explode; batch norms differ by channel."""
    from torch_fidelity import feature_extractor_inceptionv3 as port

    network = port.FeatureExtractorInceptionV3
    with (
        mock.patch.object(port, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network, "load_state_dict"),
    ):
        state = network("inception", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=generator)
    torch.save(state, path)
    return path
