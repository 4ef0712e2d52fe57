"""One of two processes that train a unit together: run as a script by test_distributed.py."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sk_triton import SelectiveKernel, use_backend

# Parts of unequal size, so that no average of averages passes for the average.
SPLIT = 4, 2


def unit():
    torch.manual_seed(1)
    return SelectiveKernel(8, groups=2, split_input=False)


def batch():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(sum(SPLIT), 8, 5, 4, generator=generator), torch.randn(
        sum(SPLIT), 8, 5, 4, generator=generator
    )


def synchronized(rank):
    """What a process computes of its part of the batch, and gradients on the joined batch."""
    layer = unit()
    # In this order, as DDP refuses SyncBatchNorm on a CPU; both share the parameters and buffers.
    model = nn.parallel.DistributedDataParallel(layer)
    nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in layer.modules()) == 3
    x, weight = (part.split(SPLIT)[rank] for part in batch())
    x = x.requires_grad_()
    with use_backend("triton"):
        v = model(x)
    v.backward(weight)
    found = {"v": v.detach(), "x": x.grad}
    # DDP averages over the processes; the sum is the gradient on the joined batch.
    found |= {name: 2 * parameter.grad for name, parameter in layer.named_parameters()}
    return found | dict(layer.named_buffers())


def sharded(rank):
    """Gradients of sharded parameters on the whole batch, which both processes see, by backend and name."""
    found = {}
    for backend in ("triton", "reference"):
        layer = fully_shard(unit(), mesh=init_device_mesh("cpu", (2,)))
        x, weight = batch()
        with use_backend(backend):
            layer(x).backward(weight)
        found |= {(backend, name): p.grad.full_tensor() for name, p in layer.named_parameters()}
    return found


def main(folder, rank, kind):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {"synchronized": synchronized, "sharded": sharded}[kind](rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # Not through the interpreter's end: tensors that threads of gloo let go of after it abort the process
    # (pytorch/pytorch#179291).
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
