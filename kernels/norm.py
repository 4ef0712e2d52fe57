"""Device helpers: what stands between a convolution and its activation, and sums that keep the variance."""

import triton
import triton.language as tl

from .tiling import relu


@triton.jit
def load_norm(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, offs, mask, HAS_NORM: tl.constexpr):
    """Mean, 1 / deviation, weight and bias of a batch norm, `[1, BLOCK_C]` each; 0, 1, 1, 0 without one."""
    if HAS_NORM:
        mean = tl.load(mean_ptr + offs, mask=mask, other=0.0)[None, :]
        rstd = tl.load(rstd_ptr + offs, mask=mask, other=0.0)[None, :]
        gamma = tl.load(gamma_ptr + offs, mask=mask, other=0.0)[None, :]
        beta = tl.load(beta_ptr + offs, mask=mask, other=0.0)[None, :]
        return mean, rstd, gamma, beta
    else:
        return 0.0, 1.0, 1.0, 0.0


@triton.jit
def normalized(y, mean, rstd, HAS_NORM: tl.constexpr):
    """`(y - mean) * rstd` in fp32: the mean is subtracted first, so that a large one costs no digits."""
    y = y.to(tl.float32)
    if HAS_NORM:
        y = (y - mean) * rstd
    return y


@triton.jit
def shifted(y, shift_ptr, offs, mask, HAS_SHIFT: tl.constexpr):
    """A convolution in fp32, with its channels' shifts added: a bias, or what is left of a norm folded into weights."""
    y = y.to(tl.float32)
    if HAS_SHIFT:
        y += tl.load(shift_ptr + offs, mask=mask, other=0.0)[None, :]
    return y


@triton.jit
def activated(y_hat, gamma, beta, HAS_NORM: tl.constexpr, HAS_RELU: tl.constexpr):
    """A branch's output from its normalized convolution."""
    u = y_hat
    if HAS_NORM:
        u = y_hat * gamma + beta
    if HAS_RELU:
        u = relu(u)
    return u


@triton.jit
def activation_mask(y_hat, gamma, beta, mask, HAS_NORM: tl.constexpr, HAS_RELU: tl.constexpr):
    """Where the activation hands gradients on, among the elements of `mask`.

    `~(u <= 0)`, not `u > 0`: a NaN passes, as it does in `torch.relu`.
    """
    if HAS_RELU:
        u = activated(y_hat, gamma, beta, HAS_NORM, False)
        return mask & ~(u <= 0.0)
    else:
        return mask


@triton.jit
def update_statistics(mean_ptr, var_ptr, counter_ptr, mean, var, offs, mask, momentum, IS_FIRST):
    """The update of `nn.BatchNorm2d` by a batch's mean and unbiased variance; the first program counts the batch."""
    for i in tl.static_range(2):
        ptr = (mean_ptr if i == 0 else var_ptr) + offs
        value = mean if i == 0 else var
        old = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
        tl.store(ptr, (old + momentum * (value - old)).to(ptr.dtype.element_ty), mask=mask)
    if IS_FIRST:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1)


@triton.jit
def lane_moments(pivot, total, squares, count):
    """Mean and centred second moment of the values of each lane, 0 where there are none.

    A lane holds `count` values as the sum and the sum of squares of their distances from `pivot`, one of them: however
    large the mean is, only the spread is squared.
    """
    own = tl.maximum(count, 1.0)
    mean = pivot + total / own
    # Rounding must not leave a negative variance.
    m2 = tl.maximum(squares - total * total / own, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(count > 0, mean, 0.0), tl.where(count > 0, m2, 0.0)


@triton.jit
def join_moments(mean, m2, count, AXIS: tl.constexpr):
    """Mean, centred second moment and number of the values of all lanes along an axis (Chan et al. 1979)."""
    size = tl.sum(count, axis=AXIS)
    joined = tl.sum(mean * count, axis=AXIS) / tl.maximum(size, 1.0)
    away = mean - tl.expand_dims(joined, AXIS)
    return joined, tl.sum(m2 + count * away * away, axis=AXIS), size


@triton.jit
def store_moments(
    moments_ptr, mean, m2, count, offs_c, mask_c, stride_part,
    RUN_W: tl.constexpr, BLOCK_CO: tl.constexpr,
):  # fmt: skip
    """Write count, mean and centred second moment of a tile's lanes `[RUN_W * BLOCK_CO, lanes]`, by channel."""
    mean, m2, count = join_moments(mean, m2, count, 1)
    if RUN_W > 1:
        mean = tl.reshape(mean, [RUN_W, BLOCK_CO])
        m2 = tl.reshape(m2, [RUN_W, BLOCK_CO])
        count = tl.reshape(count, [RUN_W, BLOCK_CO])
        mean, m2, count = join_moments(mean, m2, count, 0)
    tl.store(moments_ptr + offs_c, count, mask=mask_c)
    tl.store(moments_ptr + stride_part + offs_c, mean, mask=mask_c)
    tl.store(moments_ptr + 2 * stride_part + offs_c, m2, mask=mask_c)
