"""One of two processes that train a unit on halves of a batch: run as a script by test_distributed.py."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from sk_triton import SelectiveKernel, use_backend

# Halves of unequal size, so that no average of averages passes for the average.
SPLIT = 4, 2


def unit():
    torch.manual_seed(1)
    return SelectiveKernel(8, groups=2, split_input=False)


def batch():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(sum(SPLIT), 8, 5, 4, generator=generator), torch.randn(
        sum(SPLIT), 8, 5, 4, generator=generator
    )


def main(folder, rank):
    os.environ.update(MASTER_ADDR="localhost", WORLD_SIZE="2", RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
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
    found |= dict(layer.named_buffers())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
