"""Kernels of a few instructions, written by hand."""

import torch

from .emulator import run

HEAD = ".version 8.7\n.target sm_90\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
REGISTERS = ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<99>;\n.reg .b64 %rd<9>;\n"


def start(body, *tensors, threads=32, grid=(1,), shared=0):
    """Run `body`; the addresses of tensors are in `%rd0` and so on."""
    names = [f"k_param_{i}" for i in range(len(tensors))]
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 {name}" for name in names)
    loads = "".join(f"ld.param.b64 %rd{i}, [{name}];\n" for i, name in enumerate(names))
    text = f"{HEAD}.visible .entry k(\n{parameters}\n)\n.reqntid {threads}\n{{\n{REGISTERS}{loads}{body}\nret;\n}}\n"
    run(text, [tensor.data_ptr() for tensor in tensors], grid, shared, tensors)


def results(body, *inputs, dtype=torch.int32):
    """`%r9` of a warp's threads after `body`; `%r0` and so on are the threads' entries of `inputs`, in 32 bits each."""
    out = torch.zeros(32, dtype=dtype)
    loads = "".join(
        f"add.s64 %rd8, %rd{i + 1}, %rd7;\nld.global.b32 %r{i}, [%rd8];\n" for i in range(len(inputs))
    )
    lane = "mov.u32 %r98, %tid.x;\nmul.wide.u32 %rd7, %r98, 4;\n"
    start(f"{lane}{loads}{body}\nadd.s64 %rd8, %rd0, %rd7;\nst.global.b32 [%rd8], %r9;", out, *inputs)
    return out
