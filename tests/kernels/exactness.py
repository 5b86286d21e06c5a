"""The definition of a correct kernel: no less exact than PyTorch in the same dtype, compared with fp64."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STORAGE = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def assert_no_less_exact(ours, same_dtype, exact, name=""):
    """Check: largest error of `ours` <= 2 x the largest error of PyTorch in the same dtype + 1e-6 of the scale.

    The scale is the largest magnitude of the fp64 result. A fixed absolute tolerance would detect no error in
    gradients, most of which are below 1e-5.
    """
    assert torch.equal(ours.isfinite(), exact.isfinite()), f"{name}: finite where fp64 is not, or the other way round"
    if not exact.numel():
        return
    exact = exact.nan_to_num(0, 0, 0)
    error = (ours.double() - exact).nan_to_num(0, 0, 0).abs().max().item()
    allowed = 2 * (same_dtype.double() - exact).nan_to_num(0, 0, 0).abs().max().item() + 1e-6 * exact.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e} against fp64, allowed {allowed:.3e}"
