"""What a launch hands to Triton's compiler."""

from sk_triton.kernels.launch import Launch


def test_amd_gets_no_limit_of_registers():
    launch = Launch(None, (1,), (), {}, {"num_warps": 2, "maxnreg": 128})
    assert launch.options_for(is_amd=False) == {"num_warps": 2, "maxnreg": 128, "enable_fp_fusion": True}
    assert launch.options_for(is_amd=True) == {"num_warps": 2, "enable_fp_fusion": True}
