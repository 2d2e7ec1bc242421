"""FSDP2: weights, gradients and optimiser state in parts, one for each process.

Zhao et al. 2023, "PyTorch FSDP" (`torch.distributed.fsdp.fully_shard`). The alternative, DDP (Li et al.
2020), keeps a whole copy in every process; accelerate does that.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitrail.models import Encoder
from vitrail.processes import world


def shard_model(model: Encoder) -> None:
    """Shard a model in place with FSDP2: each block by itself, then what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (world(),))
    for name in model.block_names():
        fully_shard(model.get_submodule(name), mesh=mesh)
    # By default the outermost part stays whole after a forward pass: an average would evaluate old weights.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def whole(value: Tensor) -> Tensor:
    """A tensor that FSDP2 holds in parts, put together; any other tensor as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def sharded_like(reference: Tensor, value: Tensor) -> Tensor:
    """Of a whole tensor that every process has computed, the part that it holds of the reference."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(reference, DTensor):
        return value
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)


def unsharded_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole state dictionary on the CPU; every process must ask, the first one gets it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
