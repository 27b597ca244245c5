"""Transforms of torch.func: what they give is what loops, autograd and dense matrices give."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import convbasis as cb

N, STARTS = 13, [0, 2, 7]


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense_toeplitz(kernel):
    lag = torch.arange(kernel.shape[-1])[:, None] - torch.arange(kernel.shape[-1])
    return kernel[..., lag.clamp(min=0)] * (lag >= 0)


def dense_basis(kernels):
    """The matrix of STARTS, entry by entry."""
    rows, columns = torch.arange(N)[:, None], torch.arange(N)
    owner = torch.searchsorted(torch.tensor(STARTS), columns, right=True) - 1
    lag = rows - columns
    return kernels[..., owner.expand(N, N), lag.clamp(min=0)] * (lag >= 0)


# Each: ours, the same by a dense matrix, shapes of the arguments.
PRODUCTS = {
    "toeplitz": (cb.causal_toeplitz_matmul, lambda c, x: dense_toeplitz(c) @ x, [(N,), (N, 3)]),
    "toeplitz of a vector": (
        cb.causal_toeplitz_matmul,
        lambda c, x: dense_toeplitz(c) @ x,
        [(N,), (N,)],
    ),
    "basis": (
        lambda c, x: cb.ConvBasis(c, STARTS).matmul(x),
        lambda c, x: dense_basis(c) @ x,
        [(3, N), (N, 2)],
    ),
    "transpose": (
        lambda c, x: cb.ConvBasis(c, STARTS).mT @ x,
        lambda c, x: dense_basis(c).mT @ x,
        [(3, N), (N, 2)],
    ),
    "batch": (
        lambda c, x: cb.ConvBasis(c, STARTS) @ x,
        lambda c, x: dense_basis(c) @ x,
        [(2, 3, N), (N, 2)],
    ),
    "transforms": (
        lambda c, x: cb.ConvBasis(c, STARTS).matmul(x, backend="partitioned"),
        lambda c, x: dense_basis(c) @ x,
        [(3, N), (N, 2)],
    ),
}
every_product = pytest.mark.parametrize("name", PRODUCTS)


def members(shapes, size=4):
    return [draw(size, *shape, seed=index) for index, shape in enumerate(shapes)]


def close(one, other, limit=1e-10):
    assert one.shape == other.shape
    assert (one - other).norm() <= limit * other.norm() + 1e-13


@every_product
class TestProducts:
    def test_vmap_over_each_argument_and_both(self, name):
        ours, dense, shapes = PRODUCTS[name]
        many = members(shapes)
        for in_dims in ((0, 0), (0, None), (None, 0)):
            inputs = [x if dim == 0 else x[0] for x, dim in zip(many, in_dims, strict=True)]
            close(vmap(ours, in_dims)(*inputs), vmap(dense, in_dims)(*inputs))

    def test_vmap_along_another_dimension_and_nested(self, name):
        ours, dense, shapes = PRODUCTS[name]
        one, other = members(shapes)
        last = one.movedim(0, -1)
        close(
            vmap(ours, (-1, 0), out_dims=1)(last, other), vmap(dense, (-1, 0), out_dims=1)(last, other)
        )
        pairs = vmap(vmap(ours, (None, 0)), (0, None))
        close(pairs(one, other), vmap(vmap(dense, (None, 0)), (0, None))(one, other))

    def test_first_derivatives(self, name):
        ours, dense, shapes = PRODUCTS[name]
        inputs = [x[0] for x in members(shapes)]
        changes = [x[1] for x in members(shapes)]
        for f, g in (
            (lambda *a: grad(lambda *b: ours(*b).sin().sum(), (0, 1))(*a),
             lambda *a: grad(lambda *b: dense(*b).sin().sum(), (0, 1))(*a)),
            (lambda *a: vjp(ours, *a)[1](ours(*a)), lambda *a: vjp(dense, *a)[1](dense(*a))),
            (lambda *a: jvp(ours, a, tuple(changes)), lambda *a: jvp(dense, a, tuple(changes))),
            (jacrev(ours, (0, 1)), jacrev(dense, (0, 1))),
            (jacfwd(ours, (0, 1)), jacfwd(dense, (0, 1))),
        ):  # fmt: skip
            for one, other in zip(f(*inputs), g(*inputs), strict=True):
                close(one, other)

    def test_second_derivatives(self, name):
        ours, dense, shapes = PRODUCTS[name]
        inputs = [x[0] for x in members(shapes)]
        for function in (
            lambda f: hessian(f, (0, 1)),
            lambda f: jacrev(jacrev(f, (0, 1)), (0, 1)),
            lambda f: jacrev(jacfwd(f, (0, 1)), (0, 1)),
        ):
            found = function(lambda *a: ours(*a).sin().sum())(*inputs)
            exact = function(lambda *a: dense(*a).sin().sum())(*inputs)
            for row, other_row in zip(found, exact, strict=True):
                for one, other in zip(row, other_row, strict=True):
                    close(one, other)

    def test_forward_over_forward_is_refused(self, name):
        ours, _, shapes = PRODUCTS[name]
        inputs = [x[0] for x in members(shapes)]
        for inner, outer in ((0, 0), (0, 1), (1, 1)):
            with pytest.raises(cb.ConvBasisError, match="forward mode over forward mode"):
                jacfwd(jacfwd(lambda *a: ours(*a).sin().sum(), inner), outer)(*inputs)

    def test_gradients_of_each_member(self, name):
        ours, dense, shapes = PRODUCTS[name]
        many = members(shapes)
        found = vmap(grad(lambda *a: ours(*a).sin().sum(), (0, 1)))(*many)
        exact = vmap(grad(lambda *a: dense(*a).sin().sum(), (0, 1)))(*many)
        for one, other in zip(found, exact, strict=True):
            close(one, other)

    def test_autograd_of_every_order(self, name):
        ours, _, shapes = PRODUCTS[name]
        inputs = [x[0].requires_grad_() for x in members(shapes)]
        assert torch.autograd.gradcheck(ours, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(ours, inputs, check_fwd_over_rev=True)


def test_a_long_product_is_mapped_as_columns():
    kernel, x = draw(3000), draw(5, 3000, seed=1)
    found = vmap(lambda one: cb.causal_toeplitz_matmul(kernel, one))(x)
    assert cb.last_dispatch().backend in ("partitioned", "fft")
    assert torch.equal(found, cb.causal_toeplitz_matmul(kernel, x.mT.contiguous()).mT)


def test_the_dispatch_of_a_mapped_call_is_recorded():
    cb.causal_toeplitz_matmul(draw(3000), draw(3000))
    before = cb.last_dispatch()
    vmap(cb.causal_toeplitz_matmul)(draw(2, 5), draw(2, 5))
    assert cb.last_dispatch() != before


ATTENTION = {
    "uniform": lambda q, k, v: cb.conv_basis_attention(q, k, v, segment_length=9),
    "recovered": lambda q, k, v: cb.conv_basis_attention(q, k, v, num_bases=3),
    "given": lambda q, k, v: cb.conv_basis_attention(q, k, v, starts=[0, 5, 20]),
    "given for each head": lambda q, k, v: cb.conv_basis_attention(
        q, k, v, starts=torch.tensor([[[0, 5, 20], [0, 9, 40]]])
    ),
    "paper's gradient": lambda q, k, v: cb.conv_basis_attention(
        q, k, v, segment_length=9, gradient="attention"
    ),
    "documents": lambda q, k, v: cb.conv_basis_attention(
        q, k, v, segment_length=9, document_lengths=[15, 25]
    ),
    "hybrid": lambda q, k, v: cb.hybrid_attention(q, k, v, window=5, columns=3, sinks=1),
    "hybrid, blocks": lambda q, k, v: cb.hybrid_attention(q, k, v, window=5, blocks=1),
    "hybrid, segments": lambda q, k, v: cb.hybrid_attention(q, k, v, window=5, far_field="segments"),
    "hybrid, conv": lambda q, k, v: cb.hybrid_attention(q, k, v, window=5, far_field="conv"),
    "hybrid, strict": lambda q, k, v: cb.hybrid_attention(q, k, v, window=5, columns=3, strict=True),
}
every_attention = pytest.mark.parametrize("name", ATTENTION)


def heads(*batch, seed=0):
    return [draw(*batch, 1, 2, 40, 4, seed=seed + index) for index in range(3)]


@every_attention
class TestAttention:
    def test_vmap_is_a_loop(self, name):
        many = heads(3)
        found = vmap(ATTENTION[name])(*many)
        close(found, torch.stack([ATTENTION[name](*one) for one in zip(*many, strict=True)]))

    def test_vmap_over_values_alone(self, name):
        query, key, _ = heads()
        values = draw(3, 1, 2, 40, 4, seed=9)
        found = vmap(ATTENTION[name], (None, None, 0))(query, key, values)
        close(found, torch.stack([ATTENTION[name](query, key, value) for value in values]))

    def test_grad_and_vjp_are_those_of_autograd(self, name):
        inputs = heads()
        found = grad(lambda *a: ATTENTION[name](*a).sin().sum(), (0, 1, 2))(*inputs)
        own = [x.clone().requires_grad_() for x in inputs]
        output = ATTENTION[name](*own)
        exact = torch.autograd.grad(output.sin().sum(), own)
        pulled = vjp(ATTENTION[name], *inputs)[1](output.detach().cos())
        for one, two, other in zip(found, pulled, exact, strict=True):
            close(one, other)
            close(two, other)

    def test_gradients_of_each_member(self, name):
        many = heads(2)
        found = vmap(grad(lambda *a: ATTENTION[name](*a).sin().sum(), (0, 1, 2)))(*many)
        for index, one in enumerate(zip(*many, strict=True)):
            exact = grad(lambda *a: ATTENTION[name](*a).sin().sum(), (0, 1, 2))(*one)
            for mine, other in zip(found, exact, strict=True):
                close(mine[index], other)

    def test_rows_of_the_jacobian(self, name):
        query, key, value = heads()
        function = lambda v: ATTENTION[name](query, key, v)[0, 1, :, 0]  # noqa: E731
        matrix = jacrev(function)(value)[:, 0, 1, :, 0]  # linear in the values: the attention matrix
        close(matrix @ value[0, 1, :, 0], function(value))
        assert (matrix.triu(1).abs() < 1e-12).all()

    def test_forward_mode_is_refused_in_one_sentence(self, name):
        inputs = heads()
        message = "attention has no forward-mode derivative .*; use reverse mode: grad, vjp or jacrev"
        with pytest.raises(cb.ConvBasisError, match=message):
            jvp(ATTENTION[name], tuple(inputs), tuple(inputs))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs[2], inputs[2])
            with pytest.raises(cb.ConvBasisError, match=message):
                ATTENTION[name](inputs[0], inputs[1], dual)

    @pytest.mark.parametrize("outer", [torch.sum, lambda x: x.sin().sum()], ids=["linear", "curved"])
    def test_second_derivatives_are_refused_in_one_sentence(self, name, outer):
        inputs = heads()
        message = "the gradient of .*attention was differentiated once more; only first derivatives"
        first = grad(lambda *a: outer(ATTENTION[name](*a)), 0)
        with pytest.raises(cb.ConvBasisError, match=message):
            grad(lambda *a: first(*a).square().sum())(*inputs)
        own = [x.clone().requires_grad_() for x in inputs]
        found = torch.autograd.grad(outer(ATTENTION[name](*own)), own, create_graph=True)
        with pytest.raises(cb.ConvBasisError, match=message):
            found[0].square().sum().backward()


def test_corrected_rows_under_transforms():
    """Whole blocks of 128 rows are corrected, by later rows too: longer, and not causal."""

    def attend(q, k, v):
        return cb.hybrid_attention(q, k, v, window=9, columns=3, correction=True)

    def loss(*inputs):
        return attend(*inputs).sin().sum()

    many = [draw(2, 1, 2, 270, 4, seed=seed) for seed in range(3)]
    found, gradients = vmap(attend)(*many), vmap(grad(loss, (0, 1, 2)))(*many)
    for index, one in enumerate(zip(*many, strict=True)):
        close(found[index], attend(*one))
        plain = cb.hybrid_attention(*one, window=9, columns=3)
        assert (found[index] - plain).abs().max() > 1e-3
        own = [x.clone().requires_grad_() for x in one]
        exact = torch.autograd.grad(loss(*own), own, create_graph=True)
        for mine, other in zip(gradients, exact, strict=True):
            close(mine[index], other)
        with pytest.raises(cb.ConvBasisError, match="differentiated once more"):
            exact[0].square().sum().backward()


def test_masks_and_biases_are_mapped_too():
    query, key, value = heads(3)
    mask = torch.arange(40) >= torch.tensor([0, 3, 7])[:, None, None]
    by_key, by_lag = draw(3, 1, 2, 40, seed=5), draw(3, 2, 40, seed=6)

    def attend(q, k, v, real, one, other):
        options = {"segment_length": 9, "key_bias": one, "lag_bias": other}
        return cb.conv_basis_attention(q, k, v, key_padding_mask=real, **options)

    inputs = (query, key, value, mask, by_key, by_lag)
    loss = lambda *a: attend(*a).sin().sum()  # noqa: E731
    found = vmap(attend)(*inputs)
    of_biases = vmap(grad(loss, (4, 5)))(*inputs)
    for index, one in enumerate(zip(*inputs, strict=True)):
        close(found[index], attend(*one))
        for mine, other in zip(of_biases, grad(loss, (4, 5))(*one), strict=True):
            close(mine[index], other)
    assert (found[2][:, :, :7] == 0).all()


def test_padding_of_hybrid_attention_is_mapped():
    query, key, value = heads(3)
    mask = torch.arange(40) >= torch.tensor([0, 3, 7])[:, None, None]

    def attend(q, k, v, real):
        return cb.hybrid_attention(q, k, v, window=5, columns=3, key_padding_mask=real)

    found = vmap(attend)(query, key, value, mask)
    for index in range(3):
        close(found[index], attend(query[index], key[index], value[index], mask[index]))


def layer():
    torch.manual_seed(3)
    made = cb.nn.ConvBasisAttention(16, 4, num_kv_heads=2, segment_length=8, output_gate=True)
    return made.double()


def test_functional_call_and_gradients_of_parameters():
    module, x = layer(), draw(2, 30, 16)
    parameters = dict(module.named_parameters())
    changed = {name: 1.5 * value.detach() for name, value in parameters.items()}
    assert not torch.allclose(functional_call(module, changed, (x,)), module(x))
    loss = lambda p, inputs: functional_call(module, p, (inputs,)).sin().sum()  # noqa: E731
    found = grad(loss)(parameters, x)
    exact = torch.autograd.grad(module(x).sin().sum(), list(parameters.values()))
    for one, other in zip(found.values(), exact, strict=True):
        close(one, other)


def test_gradients_of_parameters_for_each_sequence():
    module, x = layer(), draw(3, 30, 16)
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    loss = lambda p, one: functional_call(module, p, (one[None],)).sin().sum()  # noqa: E731
    found = vmap(grad(loss), (None, 0))(parameters, x)
    for index in range(3):
        exact = grad(loss)(parameters, x[index])
        for name in parameters:
            close(found[name][index], exact[name])


def test_an_ensemble_of_layers():
    modules = [cb.nn.ConvBasisAttention(16, 4, segment_length=8).double() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(modules)
    x = draw(2, 30, 16)
    found = vmap(lambda p: functional_call(modules[0], p, (x,)))(stacked)
    close(found, torch.stack([module(x) for module in modules]))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (cb.causal_toeplitz_matmul, [(N,), (N, 3)]),
        (lambda c, x: cb.ConvBasis(c, STARTS) @ x, [(3, N), (N, 3)]),
        (lambda q, k: cb.conv_basis_attention(q, k, k, segment_length=5), [(1, 1, N, 4)] * 2),
        (lambda q, k: cb.hybrid_attention(q, k, k, window=5), [(1, 1, N, 4)] * 2),
    ],
)
def test_a_nan_in_one_member_is_found(function, shapes):
    for bad in (0, 1):
        many = members(shapes)
        many[bad].flatten()[-1 if bad else 0] = torch.nan
        for call in (vmap(function), vmap(grad(lambda *a: function(*a).sum()))):
            with pytest.raises(cb.InputError, match="holds 1 NaN or Inf"):
                call(*many)


def test_what_cannot_be_mapped_says_what_to_do():
    with pytest.raises(cb.InputError, match=r"decompose cannot be mapped.*as one batch"):
        vmap(lambda h: cb.decompose(h).segment_kernels)(draw(3, 5, 5).tril())
    with pytest.raises(cb.InputError, match=r"recover cannot be mapped.*as one batch"):
        vmap(lambda q: cb.recover(q, q, num_bases=2).segment_kernels)(draw(3, 9, 4))
    for stats, plain in (
        (
            lambda q: cb.conv_basis_attention_stats(q, q, q, segment_length=5).output,
            "conv_basis_attention",
        ),
        (lambda q: cb.hybrid_attention_stats(q, q, q, window=5).output, "hybrid_attention"),
    ):
        for call in (vmap(stats), grad(lambda q, f=stats: f(q[0]).sum())):
            with pytest.raises(cb.InputError, match=f"use {plain} there"):
                call(draw(2, 1, 1, 9, 4))


def test_decompositions_are_differentiated():
    kernels = draw(3, N)
    matrix = cb.ConvBasis(kernels, STARTS).to_dense()
    function = lambda h: cb.decompose(h).segment_kernels.sin().sum()  # noqa: E731
    found = grad(function)(matrix)
    own = matrix.clone().requires_grad_()
    close(found, torch.autograd.grad(function(own), own)[0])
    value, change = jvp(function, (matrix,), (matrix,))
    close(value, function(matrix))
    close(change, (found * matrix).sum())
