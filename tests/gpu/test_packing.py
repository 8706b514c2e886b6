"""Packed rows on a GPU: torch's kernel for variable lengths says what one call of sdpa for each sequence says.

python -m pytest tests/gpu/test_packing.py -m gpu
"""

import types
from itertools import accumulate

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from r1zero.training import packing
from tests.training.test_packing import FAMILIES, prepared, scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here"),
]
LENGTHS = (7, 1, 300, 64, 129)
ROUNDING = 2e-2  # of bfloat16, values of about one


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(8, 8, 64), (9, 3, 64), (16, 2, 128)])
def test_the_kernel_keeps_sequences_apart(heads: int, key_heads: int, width: int) -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    made = [
        torch.randn(1, count, tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]
    if not packing._kernel_takes(made[0], torch.bfloat16):
        pytest.skip("this torch, or this GPU, has no kernel for variable lengths")
    starts = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device="cuda")
    module = types.SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    upstream = torch.randn(1, tokens, heads, width, device="cuda", dtype=torch.bfloat16)
    output, _ = packing.attend(
        module, *made, None, scaling=width**-0.5, packed_lengths=list(LENGTHS), cu_seq_lens_q=starts
    )
    gradients = torch.autograd.grad((output * upstream).sum(), made)
    exact = [each.detach().float().requires_grad_() for each in made]
    query, key, value = exact
    key, value = (each.repeat_interleave(heads // key_heads, dim=1) for each in (key, value))
    pieces = [
        scaled_dot_product_attention(*each, is_causal=True)
        for each in zip(*(torch.split(whole, LENGTHS, dim=2) for whole in (query, key, value)), strict=True)
    ]
    expected = torch.cat(pieces, dim=2).transpose(1, 2)
    torch.testing.assert_close(output.float(), expected, rtol=ROUNDING, atol=ROUNDING)
    for found, wanted in zip(gradients, torch.autograd.grad((expected * upstream.float()).sum(), exact), strict=True):
        torch.testing.assert_close(found.float(), wanted, rtol=ROUNDING, atol=ROUNDING * float(wanted.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_packed_rows_are_padded_ones(family: str, half: bool) -> None:
    with torch.autocast("cuda", torch.bfloat16, enabled=half), torch.no_grad():
        model = prepared(family).to("cuda").eval()
        packing.require_apart(model, torch.device("cuda"), lambda: torch.autocast("cuda", torch.bfloat16, enabled=half))
        packed, padded = scores(model, [(3, 40), (1, 9), (50, 1), (2, 6)])
    for here, there in zip(packed, padded, strict=True):
        assert float((here - there).abs().mean()) < (0.05 if half else 1e-4)
