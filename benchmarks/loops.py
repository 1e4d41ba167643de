"""The selective scan as others write it, to be measured against: the same mathematics, gradients by
autograd
"""
import torch
import torch.nn.functional as F

def prepared(delta, delta_bias): return F.softplus(delta+delta_bias[:, None])

def finished(y, u, D, z): return (y+u*D[:, None])*F.silu(z)

def sliced(u, delta, A, B, C, D, z, delta_bias):
    "A loop that takes slices of [B, L, D] at each step, as the original project had it."
    delta = prepared(delta, delta_bias)
    # in the Mamba block these are contiguous
    ut, dt, Bt, Ct = (v.transpose(1, 2) for v in (u, delta, B, C))
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[-1]):
        u_t, delta_t = ut[:, t], dt[:, t]
        h = torch.exp(delta_t[:, :, None]*A)*h+(delta_t*u_t)[:, :, None]*Bt[:, t, None]
        ys.append((h*Ct[:, t, None]).sum(-1))
    return finished(torch.stack(ys, -1), u, D, z)

def unbound(u, delta, A, B, C, D, z, delta_bias):
    """The same loop over `unbind`, whose backward pass does not fill a whole array of zeros at each
    step.
    """
    delta = prepared(delta, delta_bias)
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for u_t, delta_t, B_t, C_t in zip(*(v.unbind(-1) for v in (u, delta, B, C))):
        h = torch.exp(delta_t[:, :, None]*A)*h+(delta_t*u_t)[:, :, None]*B_t[:, None]
        ys.append((h*C_t[:, None]).sum(-1))
    return finished(torch.stack(ys, -1), u, D, z)

def parallel(u, delta, A, B, C, D, z, delta_bias):
    """A parallel scan in PyTorch: doubling strides (Hillis & Steele 1986), ⌈log2 L⌉ passes over [B,
    L, D, N].
    """
    delta = prepared(delta, delta_bias)
    decay = torch.exp(delta.transpose(1, 2)[..., None]*A)   # [B, L, D, N]
    x = (delta*u).transpose(1, 2)[..., None]*B.transpose(1, 2)[:, :, None]
    step = 1
    while step < u.shape[-1]:
        x = torch.cat([x[:, :step], x[:, step:]+decay[:, step:]*x[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:]*decay[:, :-step]], 1)
        step *= 2
    return finished((x@C.transpose(1, 2)[..., None])[..., 0].transpose(1, 2), u, D, z)
