"""Packed rows on a GPU: torch's kernel for variable lengths says what one call of sdpa for each sequence says.

With prompts that are shared as with repeated ones.

python -m pytest tests/gpu/test_packing.py -m gpu
"""

import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from r1zero.training import packed_rows
from r1zero.training.filling import Pool, Prompt
from r1zero.training.packed_rows import Layout
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
    if not packed_rows._kernel_takes(made[0], torch.bfloat16):
        pytest.skip("this torch, or this GPU, has no kernel for variable lengths")
    device = torch.device("cuda")
    layout = Layout.of(Pool(LENGTHS, [Prompt(place, 0) for place in range(len(LENGTHS))]))
    options = layout.for_flash_attention(device) | layout.for_attend(device)
    module = types.SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    upstream = torch.randn(1, tokens, heads, width, device="cuda", dtype=torch.bfloat16)
    output, _ = packed_rows.attend(module, *made, None, scaling=width**-0.5, **options)
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


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(8, 8, 64), (9, 3, 64), (16, 2, 128)])
def test_the_kernel_lets_completions_see_their_prompt_and_nobody_elses_end(
    heads: int, key_heads: int, width: int
) -> None:
    """Output and gradients are those of whole sequences, of which the shared tokens are the same ones."""
    torch.manual_seed(0)
    # Three share 129 tokens, two share one (a branch's last query is not at a block's end), and one stands alone.
    pool = Pool([300, 130, 429, 65, 2, 77], [Prompt(0, 129)] * 3 + [Prompt(1, 1)] * 2 + [Prompt(2, 30)])
    layout = Layout.of(pool)
    lengths = layout.lengths()
    assert lengths == [129, 171, 1, 300, 1, 64, 1, 77]
    made = [
        torch.randn(1, count, sum(lengths), width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]
    if not packed_rows._kernel_takes(made[0], torch.bfloat16):
        pytest.skip("this torch, or this GPU, has no kernel for variable lengths")
    module = types.SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    upstream = torch.randn(1, sum(lengths), heads, width, device="cuda", dtype=torch.bfloat16)
    device = torch.device("cuda")
    options = layout.for_flash_attention(device) | layout.for_attend(device)
    output, _ = packed_rows.attend(module, *made, None, scaling=width**-0.5, **options)
    gradients = torch.autograd.grad((output * upstream).sum(), made)
    exact = [each.detach().float().requires_grad_() for each in made]
    segments = [torch.split(each, lengths, dim=2) for each in exact]
    pieces = []
    for number, attended in enumerate(layout.attended):
        query, key, value = (torch.cat([each[seen] for seen in attended], dim=2) for each in segments)
        key, value = (each.repeat_interleave(heads // key_heads, dim=1) for each in (key, value))
        whole = scaled_dot_product_attention(query, key, value, is_causal=True)
        pieces.append(whole[:, :, -lengths[number] :])
    expected = torch.cat(pieces, dim=2).transpose(1, 2)
    torch.testing.assert_close(output.float(), expected, rtol=ROUNDING, atol=ROUNDING)
    for found, wanted in zip(gradients, torch.autograd.grad((expected * upstream.float()).sum(), exact), strict=True):
        torch.testing.assert_close(found.float(), wanted, rtol=ROUNDING, atol=ROUNDING * float(wanted.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_packed_rows_are_padded_ones(family: str, half: bool) -> None:
    with torch.autocast("cuda", torch.bfloat16, enabled=half), torch.no_grad():
        model = prepared(family).to("cuda").eval()
        packed_rows.require_apart(
            model, torch.device("cuda"), lambda: torch.autocast("cuda", torch.bfloat16, enabled=half)
        )
        packed, padded = scores(model, [(3, 40), (1, 9), (50, 1), (2, 6)])
    for here, there in zip(packed, padded, strict=True):
        assert float((here - there).abs().mean()) < (0.05 if half else 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_shared_prompts_are_repeated_ones(family: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities and gradients of a row whose completions share prompts; fewer tokens go through the model."""
    tokens: list[int] = []
    model = prepared(family).to("cuda").train()
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    lengths = [(70, 40), (70, 9), (70, 1), (70, 200), (2, 6), (2, 3), (2, 1), (2, 9)]
    said, gradients = [], []
    for sharing in (False, True):
        monkeypatch.setattr(packed_rows, "SHARING", sharing)
        packed_rows.require_apart(
            model, torch.device("cuda"), lambda: torch.autocast("cuda", torch.bfloat16, enabled=half)
        )
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            tokens.clear()
            (logps, _), _ = scores(model, lengths, 4)
        assert tokens[0] == sum(map(sum, lengths)) - (3 * 69 + 3 * 1 if sharing else 0)
        model.zero_grad()
        logps.square().sum().backward()
        said.append(logps.detach())
        gradients.append(torch.cat([each.grad.flatten().float() for each in model.parameters()]))
    assert float((said[0] - said[1]).abs().mean()) < (0.05 if half else 1e-4)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < (0.05 if half else 1e-4)
