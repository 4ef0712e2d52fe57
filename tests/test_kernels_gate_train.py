"""The gate's training kernels, interpreted, against float64 and its autograd."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from sk_triton.kernels.running import Running

from .tolerances import assert_errs_like_eager, assert_typical_errors_like_eager
from .watched import nans, run_allowing

pytestmark = pytest.mark.interpret

# Samples, branches, channels, entries of z, tiles of each sum.
SIZES = {
    "one block": (3, 2, 20, 16, 1),
    "blocks of all": (19, 3, 70, 40, 2),
    "many samples": (133, 2, 5, 3, 1),
    "one sample": (1, 1, 130, 8, 3),
}
EPSILON = 1e-3


def inputs(name):
    """fp32 and fp16 parameters and sums, as the kernels read them."""
    n, m, c, d, tiles = SIZES[name]
    torch.manual_seed(7)
    return {
        "active": torch.rand(tiles, n, m, c), "pooled": torch.randn(tiles, n, m, c), "affine": torch.randn(2, m, c),
        "reduce": torch.randn(d, c).half(), "bias": torch.randn(d).half(), "gamma": torch.randn(d),
        "beta": torch.randn(d), "mean": torch.randn(d).half(), "var": torch.rand(d).half(),
        "select": torch.randn(m, c, d), "select_bias": torch.randn(m, c).half(),
        "grad": torch.randn(tiles, n, m, c), "scaled": torch.randn(tiles, n, m, c),
    }  # fmt: skip


def forward(t, statistics, *, pixels, has_norm, is_lean, dtype):
    """(s, h, z, mean, rstd, var, attention) by PyTorch in `dtype`; differentiable."""
    t = {name: tensor if tensor.requires_grad else tensor.to(dtype) for name, tensor in t.items()}
    active, pooled = (t[name].to(dtype).sum(0) for name in ("active", "pooled"))  # [N, M, C]
    affine = t["affine"].to(dtype)
    s = (affine[1] * pooled + affine[0] * active if has_norm else pooled).sum(1) / pixels
    h = F.linear(s, t["reduce"].to(dtype), None if is_lean else t["bias"].to(dtype))
    mean, var = (t[name].to(dtype) for name in ("mean", "var"))
    unbiased = var
    if statistics == "batch":
        var, mean = torch.var_mean(h, 0, correction=0)
        unbiased = var * (len(h) / max(1, len(h) - 1))
    rstd = (var + EPSILON).rsqrt()
    z = h
    if statistics != "none":
        z = (h - mean) * rstd
        z = z if is_lean else z * t["gamma"].to(dtype) + t["beta"].to(dtype)
    z = z if is_lean else z.relu()
    logits = torch.einsum("nd,mcd->nmc", z, t["select"].to(dtype))
    logits = logits if is_lean else logits + t["select_bias"].to(dtype)
    return s, h, z, mean, rstd, unbiased, logits.softmax(1)


def run_forward(t, statistics, *, pixels, has_norm, is_lean):
    from sk_triton.kernels.gate_train import gate_norm_fwd, gate_reduce_fwd, gate_select_fwd, summand_shape

    tiles, n, m, c = t["pooled"].shape
    d = t["reduce"].shape[0]
    total = nans(2, n, m, c) if tiles > 1 and has_norm else None
    out = {"s": nans(n, c), "summands": nans(*summand_shape(n, c, d))}
    out |= {} if total is None else {"total": total}
    step = gate_reduce_fwd(
        t["active"], t["pooled"], t["affine"], t["reduce"], total, out["s"], out["summands"], pixels=pixels,
        has_norm=has_norm,
    )  # fmt: skip
    run_allowing(step, **out, **{name: t[name] for name in ("active", "pooled", "affine", "reduce")})
    if total is not None:
        assert_errs_like_eager(total[0], t["active"].sum(0), t["active"].double().sum(0))
        assert_errs_like_eager(total[1], t["pooled"].sum(0), t["pooled"].double().sum(0))
    out |= {"h": nans(n, d), "z": nans(n, d), "mean_out": nans(d), "rstd": nans(d), "var_out": nans(d)}
    params = {} if is_lean else {name: t[name] for name in ("bias", "gamma", "beta")}
    given = {name: t[name] for name in ("mean", "var")} if statistics == "given" else {}
    running = Running(t["mean"].clone(), t["var"].float(), torch.tensor(6), 0.25)
    step = gate_norm_fwd(
        out["summands"], params.get("bias"), params.get("gamma"), params.get("beta"),
        tuple(given.values()), out["h"], out["z"], out["mean_out"], out["rstd"], out["var_out"], running,
        statistics=statistics, epsilon=EPSILON, has_relu=not is_lean,
    )  # fmt: skip
    run_allowing(step, **out, **params, **given, **{f"running {i}": own for i, own in enumerate(running[:3])})
    is_batch = statistics == "batch"
    assert running.counter == 6 + is_batch
    for own, before, by in zip(
        running, (t["mean"], t["var"]), (out["mean_out"], out["var_out"]), strict=False
    ):
        expected = torch.lerp(before.float(), by, 0.25) if is_batch else before.float()
        torch.testing.assert_close(own, expected.to(own.dtype))
    out["attention"] = nans(n, m, c)
    biases = None if is_lean else t["select_bias"].unbind(0)
    step = gate_select_fwd(out["z"], t["select"].unbind(0), biases, out["attention"])
    run_allowing(
        step, z=out["z"], attention=out["attention"], select=t["select"], select_bias=t["select_bias"]
    )
    return out


STATISTICS = pytest.mark.parametrize("statistics", ["batch", "given", "none"])
FLAGS = pytest.mark.parametrize(
    ("has_norm", "is_lean"), [(True, False), (False, True)], ids=["norms, biases, ReLU", "none"]
)


@STATISTICS
@FLAGS
def test_forward(statistics, has_norm, is_lean):
    samples = {}
    for name in SIZES:
        if name == "one sample" and statistics == "batch":
            continue
        t, settings = inputs(name), {"pixels": 6, "has_norm": has_norm, "is_lean": is_lean}
        found = run_forward(t, statistics, **settings)
        exact = forward(t, statistics, **settings, dtype=torch.float64)
        eager = forward(t, statistics, **settings, dtype=torch.float32)
        names = ["s", "h", "z", "mean_out", "rstd", "var_out", "attention"]
        for key, ours, theirs in zip(names, eager, exact, strict=True):
            if statistics == "none" and key in ("mean_out", "rstd", "var_out"):
                assert found[key].isnan().all()
            else:
                samples.setdefault(key, []).append((found[key], ours, theirs))
    for own in samples.values():
        assert_typical_errors_like_eager(own)


@STATISTICS
@FLAGS
def test_backward(statistics, has_norm, is_lean):
    """Given what the branches say of the attention's gradient, all that follows from it, as autograd has it."""
    samples = {}
    for name in SIZES:
        if name == "one sample" and statistics == "batch":
            continue
        for key, sample in backward_samples(name, statistics, has_norm, is_lean).items():
            samples.setdefault(key, []).append(sample)
    for own in samples.values():
        assert_typical_errors_like_eager(own)


def backward_samples(name, statistics, has_norm, is_lean):
    """(ours, eager's, exact) of each gradient."""
    from sk_triton.kernels.gate_params_bwd import gate_params_bwd
    from sk_triton.kernels.gate_train import summand_shape
    from sk_triton.kernels.gate_train_bwd import (
        gate_norm_bwd,
        gate_reduce_bwd,
        gate_select_bwd,
    )

    t, settings = inputs(name), {"pixels": 6, "has_norm": has_norm, "is_lean": is_lean}
    tiles, n, m, c = t["pooled"].shape
    d = t["reduce"].shape[0]
    out = run_forward(t, statistics, **settings)
    sums = torch.stack([t["active"].sum(0), t["pooled"].sum(0)])
    rstd, gamma = torch.rand(m, c), t["affine"][1].contiguous()
    batch_norms = [True, False, True][:m]

    total = nans(2, n, m, c) if tiles > 1 else None
    work = {"dlogits": nans(n, m, c), "dz": nans(*summand_shape(n, c, d))}
    work |= {} if total is None else {"grad_total": total}
    both = torch.stack([t["grad"], t["scaled"]])
    step = gate_select_bwd(
        both, t["affine"], out["attention"], t["select"].unbind(0), total, work["dlogits"], work["dz"],
        has_norm=has_norm,
    )  # fmt: skip
    run_allowing(step, **work, both=both, affine=t["affine"], select=t["select"], attention=out["attention"])
    grads = torch.stack([t["grad"][0], t["scaled"][0]]) if total is None else total
    work |= {"dh": nans(n, d), "dgamma": nans(d), "dbeta": nans(d).half(), "dbias": nans(d)}
    gate_gamma = None if is_lean else t["gamma"]
    step = gate_norm_bwd(
        work["dz"], out["h"], out["z"], out["mean_out"], out["rstd"], gate_gamma, work["dh"], work["dgamma"],
        work["dbeta"], work["dbias"], statistics=statistics, has_relu=not is_lean,
    )  # fmt: skip
    run_allowing(step, **work, **out, gate_gamma=t["gamma"])
    work["g"] = nans(n, c)
    run_allowing(gate_reduce_bwd(work["dh"], t["reduce"], work["g"], pixels=6), **work, reduce=t["reduce"])
    work |= {
        "affine_grad": nans(2, m, c), "terms": nans(2, m, c), "dbetas": nans(m, c).half(), "dgammas": nans(m, c),
        "dbiases": nans(m, c), "dreduce": nans(d, c), "dselect": nans(m, c, d), "dselect_bias": nans(m, c),
    }  # fmt: skip
    has = {name: None if is_lean else work[name].unbind(0) for name in ("dbetas", "dbiases", "dselect_bias")}
    step = gate_params_bwd(
        work["dh"], out["s"], out["z"], work["dlogits"], out["attention"], work["g"], grads, sums, rstd, gamma,
        work["affine_grad"], work["terms"], has["dbetas"], work["dgammas"].unbind(0) if has_norm else None,
        has["dbiases"], work["dreduce"], work["dselect"].unbind(0), has["dselect_bias"],
        batch_norms=batch_norms, values=5, has_norm=has_norm,
    )  # fmt: skip
    run_allowing(step, **work, **out, grads=grads, sums=sums, rstd_in=rstd, gamma_in=gamma)

    def gradients(dtype):
        leaves = {
            k: t[k].to(dtype).requires_grad_()
            for k in ("reduce", "bias", "gamma", "beta", "select", "select_bias")
        }
        # The pooled features as a leaf of its own: their gradient is that of every pixel's share, times the pixels.
        run = functools.partial(forward, statistics=statistics, dtype=dtype, **settings)
        s = run(t)[0].detach()
        pooled = (s[None, :, None] * 6).requires_grad_()
        inner = {
            **t,
            **leaves,
            "pooled": pooled,
            "active": torch.zeros_like(pooled),
            "affine": torch.ones(2, 1, c),
        }
        attention = run(inner)[-1]
        affine, grad, scaled = (t[k].to(dtype) for k in ("affine", "grad", "scaled"))
        da = affine[1] * scaled.sum(0) + affine[0] * grad.sum(0) if has_norm else scaled.sum(0)
        used = [k for k, leaf in leaves.items() if not (is_lean and k not in ("reduce", "select"))]
        used = [k for k in used if not (statistics == "none" and k in ("gamma", "beta"))]
        found = torch.autograd.grad(attention, [pooled, *(leaves[k] for k in used)], da)
        result = dict(zip(["g", *used], found, strict=True))
        g, a = result["g"][0, :, 0], attention.detach()
        result["g"] = g
        parts = torch.stack([grad.sum(0), scaled.sum(0)]), sums.to(dtype)
        result["affine_grad"] = (a * parts[0] + g[:, None] * parts[1]).sum(1)
        return result

    exact, eager = gradients(torch.float64), gradients(torch.float32)
    names = {
        "g": "g", "reduce": "dreduce", "bias": "dbias", "gamma": "dgamma", "select": "dselect",
        "select_bias": "dselect_bias", "affine_grad": "affine_grad",
    }  # fmt: skip
    samples = {}
    for key in names.keys() & exact.keys():
        sample = work[names[key]], eager[key], exact[key]
        if key == "bias" and statistics == "batch":  # zero but for rounding
            assert sample[0].abs().max() <= 1e-6 * work["dh"].abs().max() * n
        else:
            samples[key] = tuple(x[:1] for x in sample) if key == "affine_grad" and not has_norm else sample
    own = torch.tensor([1 / 5 if is_batch else 0.0 for is_batch in batch_norms])[:, None]
    affine_grad = work["affine_grad"]
    torch.testing.assert_close(work["terms"], affine_grad * own, rtol=1e-6, atol=1e-8)
    if not is_lean:
        assert torch.equal(work["dbetas"], affine_grad[0].half())
        assert torch.equal(work["dgammas"], affine_grad[1])
        factor = torch.tensor([0.0 if is_batch else 1.0 for is_batch in batch_norms])[:, None] * gamma * rstd
        torch.testing.assert_close(work["dbiases"], affine_grad[0] * factor, rtol=1e-6, atol=1e-8)
    return samples


def test_statistics_that_are_not_the_batchs_take_no_gradient():
    """Not even of an infinity, which times zero is NaN in every sample."""
    from sk_triton.kernels.gate_params_bwd import gate_params_bwd

    n, m, c, d = 2, 2, 20, 16
    a, g = torch.rand(n, m, c), torch.randn(n, c)
    grads, sums = torch.randn(2, n, m, c), torch.rand(2, n, m, c)
    grads[:, 0, :, 3] = math.inf
    affine, terms = nans(2, m, c), nans(2, m, c)
    gate_params_bwd(
        torch.randn(n, d), torch.randn(n, c), torch.randn(n, d), torch.randn(n, m, c), a, g, grads, sums,
        torch.rand(m, c), torch.rand(m, c), affine, terms, None, None, None, nans(d, c), nans(m, c, d).unbind(0), None,
        batch_norms=[False, True], values=4, has_norm=True,
    )()  # fmt: skip
    assert not affine[:, :, 3].isfinite().any()
    assert not terms[:, 0].any()
    assert not terms[:, 1, 3].isfinite().any()


def test_a_bad_value_stays_with_what_it_reaches():
    t = inputs("one block")
    t["pooled"][0, 1, 0, 3] = math.nan
    found = run_forward(t, "given", pixels=6, has_norm=True, is_lean=False)
    assert found["s"].isnan().sum() == 1
    assert found["attention"].isnan().all((1, 2)).tolist() == [False, True, False]
