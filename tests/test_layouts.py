"""Memory layouts and sizes: the kernels read logical elements, so no layout changes any bit (on CUDA, none
but the last of a sum)."""

import pytest
import torch
from compare import assert_close, assert_same_of_any_kernel, cotangents, gradients
from samples import SAMPLES, each, first_of_each_op

# Around the widths of vectors (4 to 16 numbers), of blocks (512) and of segments (4096).
SIZES = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 511, 512, 513, 4095, 4096, 4097)


def _channels_last(t):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format))


def _transposed(t):
    """Strides in reverse order."""
    backwards = tuple(reversed(range(t.dim())))
    return t.permute(backwards).contiguous().permute(backwards)


def _strided(t):
    """Every other element, in every dimension, of a larger tensor of other numbers."""
    if t.dim() == 0:
        return t
    larger = torch.full([2 * n + 1 for n in t.shape], 1, dtype=t.dtype, device=t.device)
    view = larger[tuple(slice(1, 2 * n, 2) for n in t.shape)]
    return view.copy_(t)


def _misaligned(t):
    """Dense, one element after an aligned address."""
    store = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return store[1:].view(t.shape).copy_(t)


def _rows_apart(t):
    """Rows of a wider tensor, as a slice of a concatenation leaves them."""
    if t.dim() < 2:
        return t
    return torch.cat([t, t, t], dim=1)[:, t.shape[1] : 2 * t.shape[1]]


LAYOUTS = [_channels_last, _transposed, _strided, _misaligned, _rows_apart]


def _apply(layout, inputs):
    """Every input in the layout, except one in four, so that layouts meet."""
    made = {}
    for k, (name, t) in enumerate(inputs.items()):
        grad = t.requires_grad
        t = t.detach() if k % 4 == 3 else layout(t.detach())
        made[name] = t.requires_grad_(grad)
    return made


def _assert_same_everywhere(sample, inputs, plain):
    actual, expected = sample(inputs), sample(plain)
    for a, e in zip(actual, expected, strict=True):
        assert_same_of_any_kernel(a, e)
    actual, expected = gradients(actual, inputs), gradients(expected, plain)
    for name, gradient in actual.items():
        assert_same_of_any_kernel(gradient, expected[name], name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each()
def test_layout_changes_no_bit(sample, device, dtype, layout):
    plain = sample.inputs(device, dtype, grad=True)
    _assert_same_everywhere(sample, _apply(layout, plain), plain)


def _expand(t, dims):
    """Stride 0 along dims."""
    t = t.detach()
    for d in dims:
        if d < t.dim():
            t = t.narrow(d, 0, 1)
    return t


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1, 2, 3, 4, 5)], ids=str)
@each()
def test_expanded_inputs(sample, device, dims):
    made = sample.inputs(device, torch.float32, grad=True)
    inputs, plain = {}, {}
    for name, t in made.items():
        expanded = _expand(t, dims).expand(t.shape)
        inputs[name] = expanded.requires_grad_(t.requires_grad)
        plain[name] = expanded.detach().contiguous().requires_grad_(t.requires_grad)
    _assert_same_everywhere(sample, inputs, plain)


@each()
def test_expanded_upstream_gradient(sample, device):
    """What sum().backward() hands over: one number, stride 0."""
    inputs = sample.inputs(device, torch.float32, grad=True)
    outputs = [o for o in sample(inputs) if o.requires_grad]
    names = [n for n, t in inputs.items() if t.requires_grad]
    tensors = [inputs[n] for n in names]
    expanded = [torch.full((), 0.5, device=device).expand(o.shape) for o in outputs]
    dense = [e.contiguous() for e in expanded]
    first = torch.autograd.grad(outputs, tensors, expanded, retain_graph=True)
    for name, a, e in zip(names, first, torch.autograd.grad(outputs, tensors, dense), strict=True):
        assert_same_of_any_kernel(a, e, name)


@each([s for s in first_of_each_op() if "none" in s.options.values()] + SAMPLES[:2])
def test_strided_upstream_gradient(sample, device):
    inputs = sample.inputs(device, grad=True)
    outputs = [o for o in sample(inputs) if o.requires_grad]
    tensors = [t for t in inputs.values() if t.requires_grad]
    dense = cotangents(outputs)
    for layout in LAYOUTS:
        other = [layout(c) for c in dense]
        first = torch.autograd.grad(outputs, tensors, other, retain_graph=True)
        second = torch.autograd.grad(outputs, tensors, dense, retain_graph=True)
        for a, e in zip(first, second, strict=True):
            assert_same_of_any_kernel(a, e)


def _rank(sample):
    return max(len(m.shape) for m in sample.tensors.values())


def _resized(sample, shape_of):
    """The sample's inputs with shapes replaced: repeated or cut to shape_of(old shape)."""
    made = {}
    tensors = sample.inputs(grad=False)
    full = next(iter(tensors.values())).shape
    for name, t in tensors.items():
        if "target" in tensors:
            before = len(full) - t.dim()  # dimensions that the tensor is broadcast along
            one_for_all = t.dim() == 0 or (t.dim() == 1 and len(full) > 2)  # or one per channel
            # The target of slots has no dimension of slots, the second one.
            at = 1 if name == "target" else 0
            padded = (*t.shape[:at], *(1,) * before, *t.shape[at:])
            new = shape_of(padded)
            shape = t.shape if one_for_all else (*new[:at], *new[at + before :])
        else:  # latents, which the others broadcast to
            shape = t.shape if name == "seed" else _broadcast_shape(t.shape, full, shape_of(full))
        for d, n in enumerate(shape):
            t = t.index_select(d, torch.arange(n) % max(1, t.shape[d]))
        made[name] = t
    return made


def _broadcast_shape(shape, full, new):
    """The shape of what broadcasts to `full`, where that becomes `new`."""
    missing = len(full) - len(shape)
    return [n if shape[d] == full[missing + d] else 1 for d, n in enumerate(new[missing:])]


def _to(made, device, dtype):
    return {
        n: t.to(device, dtype).requires_grad_() if t.is_floating_point() else t.to(device)
        for n, t in made.items()
    }


def _assert_right(sample, inputs):
    actual, expected = sample(inputs), sample.expected(inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)
    actual, expected = gradients(actual, inputs), gradients(expected, inputs)
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], note=name)


@pytest.mark.parametrize("size", SIZES)
@each(first_of_each_op())
def test_sizes_around_vector_widths(sample, device, size):
    """As the last extent; and as the first, where rows are short and many share a task."""
    for dtype in (torch.float32, torch.float64):
        _assert_right(sample, _to(_resized(sample, lambda s: (*s[:-1], size)), device, dtype))
    if size > 1:
        _assert_right(sample, _to(_resized(sample, lambda s: (size, *s[1:])), device, torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.strip("_"))
@each([s for s in SAMPLES if "slots" not in s.tensors and _rank(s) == 4][::2])
def test_layouts_across_blocks(sample, device, layout):
    """Images and latents of more than one block and segment, cut in the middle of a row."""
    made = _resized(sample, lambda s: (*s[:2], 61, 71))
    plain = _to(made, device, torch.float32)
    _assert_same_everywhere(sample, _apply(layout, plain), plain)


@pytest.mark.parametrize("dim", [0, -1])
@each([s for s in SAMPLES if "slots" not in s.tensors])
def test_no_elements(sample, device, dim):
    """An empty batch, an empty image: no crash, empty gradients, and the specification's value (0, or
    NaN for a mean over nothing)."""
    rank = _rank(sample)
    if sample.op == "categorical_kl" and dim == -1 and sample.options["dim"] in (-1, rank - 1):
        pytest.skip("no outcomes: refused")
    size = next(iter(sample.tensors.values())).shape[dim]

    def has_it(name, t):
        if "target" in sample.tensors:
            return t.dim() == rank or (dim == -1 and t.dim() > 1)
        return name != "seed" and t.dim() >= (1 if dim == -1 else rank) and t.shape[dim] == size

    inputs = {
        n: t.detach().narrow(dim, 0, 0).requires_grad_(t.requires_grad) if has_it(n, t) else t
        for n, t in sample.inputs(device, grad=True).items()
    }
    actual, expected = sample(inputs), sample.expected(inputs)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert_close(a, e)
    actual, expected = gradients(actual, inputs), gradients(expected, inputs)
    for name, gradient in actual.items():
        assert gradient.shape == inputs[name].shape
        assert_close(gradient, expected[name], note=name)


@each()
def test_one_element(sample, device):
    rank = _rank(sample)
    inputs = {}
    for name, t in sample.inputs(device, grad=True).items():
        t1 = t.detach()
        for d in range(t.dim()):
            t1 = t1.narrow(d, 0, 1) if t.dim() == rank or t.numel() > 1 else t1
        inputs[name] = t1.clone().requires_grad_(t.requires_grad)
    if sample.options.get("normalize") == "area" and not sample.smooth:
        pytest.skip("one region is empty by construction")
    _assert_right(sample, inputs)


def test_dense_results_keep_the_layout_of_their_inputs(device):
    """z, an unreduced loss and gradients of channels_last inputs are channels_last: no copies."""
    for sample in SAMPLES:
        if sample.options.get("num_samples") or sample.options.get("channels") == "joint":
            continue
        if sample.options.get("batch_dims") or "slots" in sample.tensors:
            continue  # whose four dimensions are not those of an image
        made = sample.inputs(device, grad=True)
        inputs = {n: _channels_last(t.detach()).requires_grad_(t.requires_grad) for n, t in made.items()}
        outputs = sample(inputs)
        for name, gradient in gradients(outputs, inputs).items():
            if gradient.dim() == 4:
                assert gradient.is_contiguous(memory_format=torch.channels_last), (sample.id, name)
        for o in outputs:
            if o.dim() == 4:
                assert o.is_contiguous(memory_format=torch.channels_last), sample.id
