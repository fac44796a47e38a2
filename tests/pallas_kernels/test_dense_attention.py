"""`dense_attention`: every implementation against the numpy oracle; what cuDNN is asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from op_cases import (
    BATCH,
    HEAD_DIM,
    INPUT_DTYPES,
    LAYOUTS,
    NUM_HEADS,
    NUM_KEYS,
    NUM_KV_HEADS,
    ONE_DOCUMENT,
    PACKED,
    TOLERANCES,
    assert_close,
    compiled,
    exact,
    finite_difference,
    main_inputs,
    normal,
)

from pallas_kernels import dense_attention

# No window, its own token alone, one that ends inside a block, all but the first token.
WINDOWS = (0, 1, 5, NUM_KEYS - 1)


@functools.partial(compiled, static_argnames=("implementation", "scale", "window"))
def attend(q, k, v, do, dlse, *, query_offset=None, **options):
    """Output, log-sum-exp and the gradients of q, k and v. One compilation serves many tests."""
    options["query_offset"] = 0 if query_offset is None else query_offset
    (o, lse), pullback = jax.vjp(
        lambda *qkv: dense_attention(*qkv, return_lse=True, **options), q, k, v
    )
    return o, lse, *pullback((do.astype(o.dtype), dlse.astype(lse.dtype)))


def cotangents(dtype, num_queries=NUM_KEYS):
    do = jnp.asarray(normal(6, BATCH, num_queries, NUM_HEADS, HEAD_DIM), dtype)
    return do, jnp.asarray(normal(7, BATCH, NUM_HEADS, num_queries))


class DenseAttentionTests:
    """Subclass per implementation; `dtypes`, widest first, and `tolerances` are its promise."""

    implementation: str
    dtypes: tuple[str, ...]
    tolerances = TOLERANCES

    def assert_as_oracle(self, results, arguments, mask, scale=None):
        q, k, v, do, dlse = exact(*arguments)
        expected = numpy_oracle.attention(q, k, v, mask, scale)
        gradients = numpy_oracle.attention_gradients(q, k, v, mask, do, dlse, scale)
        for actual, wanted in zip(results, (*expected, *gradients), strict=True):
            assert_close(actual, wanted, self.tolerances)

    def assert_case(self, layout, window, dtype):
        q, k, v = main_inputs(dtype, layout.num_queries)
        do, dlse = cotangents(dtype, layout.num_queries)
        results = attend(
            q,
            k,
            v,
            do,
            dlse,
            window=window,
            implementation=self.implementation,
            **layout.arrays(),
        )
        self.assert_as_oracle(results, (q, k, v, do, dlse), layout.support(window=window))
        return results

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_output_log_sum_exp_and_gradients(self, layout, widest_dtype):
        self.assert_case(layout, 0, widest_dtype)

    def test_dtypes(self, dtype):
        o, lse, *gradients = self.assert_case(PACKED, 0, dtype)
        assert all(x.dtype == dtype for x in (o, *gradients))
        assert lse.dtype == ("float64" if dtype == "float64" else "float32")

    @pytest.mark.parametrize("window", WINDOWS[1:])
    def test_window(self, window, widest_dtype):
        self.assert_case(ONE_DOCUMENT, window, widest_dtype)

    def test_window_within_documents_from_a_cache(self, widest_dtype):
        self.assert_case(LAYOUTS["packed decode"], 5, widest_dtype)

    def test_scale(self, widest_dtype):
        arguments = (*main_inputs(widest_dtype), *cotangents(widest_dtype))
        results = attend(*arguments, scale=0.7, implementation=self.implementation)
        self.assert_as_oracle(results, arguments, ONE_DOCUMENT.support(), scale=0.7)

    @pytest.mark.parametrize("num_kv_heads", [1, NUM_HEADS])
    def test_multi_query_and_multi_head(self, num_kv_heads, widest_dtype):
        q, _, _ = main_inputs(widest_dtype)
        shape = (BATCH, NUM_KEYS, num_kv_heads, HEAD_DIM)
        k, v = (jnp.asarray(normal(seed, *shape), widest_dtype) for seed in (8, 9))
        arguments = (q, k, v, *cotangents(widest_dtype))
        mask = numpy_oracle.support(BATCH, num_kv_heads, NUM_KEYS, NUM_KEYS)
        results = attend(*arguments, implementation=self.implementation)
        self.assert_as_oracle(results, arguments, mask)

    @pytest.mark.fast
    def test_padding_is_zero_with_zero_gradients(self, dtype):
        q, k, v = main_inputs(dtype)
        padding = PACKED.segment_ids == 0
        o, lse, dq, dk, dv = attend(
            q,
            k,
            v,
            *cotangents(dtype),
            window=0,
            implementation=self.implementation,
            **PACKED.arrays(),
        )
        assert all((np.asarray(x)[padding] == 0).all() for x in (o, dq, dk, dv))
        assert all(np.isfinite(x).all() for x in exact(o, dq, dk, dv))
        lse = np.moveaxis(np.asarray(lse), 1, 2)
        assert (lse[padding] == -np.inf).all()
        assert np.isfinite(lse[~padding]).all()

    def test_the_log_sum_exp_is_optional(self, widest_dtype):
        q, k, v = main_inputs(widest_dtype)
        attend = functools.partial(dense_attention, implementation=self.implementation)
        o = compiled(attend)(q, k, v)
        expected, _ = numpy_oracle.attention(*exact(q, k, v), ONE_DOCUMENT.support())
        assert_close(o, expected, self.tolerances)


class TestReference(DenseAttentionTests):
    implementation = "reference"
    dtypes = INPUT_DTYPES

    def test_gradients_are_the_finite_differences_of_the_oracle(self):
        mask = PACKED.support()
        padding = np.repeat(~mask.any(-1), NUM_HEADS // NUM_KV_HEADS, axis=1)
        with jax.enable_x64(True):
            qkv, (do, dlse) = main_inputs("float64"), cotangents("float64")
            _, _, *gradients = attend(
                *qkv, do, dlse, implementation="reference", window=0, **PACKED.arrays()
            )
            qkv, gradients, (do, dlse) = exact(*qkv), exact(*gradients), exact(do, dlse)

        def loss(*qkv):
            o, lse = numpy_oracle.attention(*qkv, mask)
            return (o * do).sum() + (np.where(padding, 0, lse) * dlse).sum()

        for wrt, gradient in enumerate(gradients):
            for seed in range(3):
                direction = normal(seed, *gradient.shape)
                slope = finite_difference(loss, qkv, wrt, direction)
                np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6)


@pytest.fixture
def answered_by_xla(monkeypatch):
    """Answers cuDNN's call on a CPU, with the same residuals; yields a list of the calls."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    answer, calls = jax.nn.dot_product_attention, []

    def by_xla(*qkv, implementation, scale, **options):
        assert implementation == "cudnn"
        calls.append(scale)

        def forward(q, k, v):
            o = answer(q, k, v, implementation="xla", scale=scale, **options)
            keys = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
            scores = jnp.einsum("bthd,bshd->bhts", q, keys, preferred_element_type="float32")
            slots = jnp.arange(q.shape[1])
            seen = slots[:, None] >= slots
            if options["local_window_size"]:
                seen &= slots[:, None] - slots <= options["local_window_size"][0]
            lse = jax.nn.logsumexp(jnp.where(seen, scale * scores, -jnp.inf), axis=-1)
            return o, (q, k, v, o, lse)

        def backward(residuals, d_o):
            q, k, v, o, lse = residuals
            _, pullback = jax.vjp(
                lambda *qkv: answer(*qkv, implementation="xla", scale=scale, **options), q, k, v
            )
            # Read, as cuDNN reads them, so that a pass that forgot them computes them again.
            unchanged = 1 + 0 * (lse.sum() + o.astype("float32").sum())
            return pullback((d_o * unchanged).astype(d_o.dtype))

        attend = jax.custom_vjp(lambda *qkv: forward(*qkv)[0])
        attend.defvjp(forward, backward)
        return attend(*qkv)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    return calls


class TestCudnn:
    """cuDNN itself needs a GPU; what it refuses, and what it is asked to compute, do not."""

    def refusal(self, *qkv, **options):
        with pytest.raises(NotImplementedError) as refused:
            dense_attention(*qkv, implementation="cudnn", **options)
        return str(refused.value)

    @pytest.mark.fast
    def test_refuses_another_platform(self):
        assert "needs a CUDA device, this is 'cpu'" in self.refusal(*main_inputs("bfloat16"))

    def test_refuses_what_its_call_has_no_argument_for(self, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        q, k, v = main_inputs("bfloat16")
        assert "packed documents" in self.refusal(q, k, v, **PACKED.arrays())
        for shifted in ({"query_offset": 21}, {"query_offset": jnp.array([21, 5])}, {}):
            assert "aligns the first query" in self.refusal(q[:, :16], k, v, **shifted)
        for dtype in ("float32", "float64"):
            with jax.enable_x64(dtype == "float64"):
                assert f"not {dtype}" in self.refusal(*main_inputs(dtype))
        for head_dim in (12, 136):
            odd = [jnp.zeros((1, 8, 2, head_dim), jnp.bfloat16)] * 3
            assert f"head_dim={head_dim}" in self.refusal(*odd)

    @pytest.mark.parametrize("window", WINDOWS)
    def test_is_asked_for_the_op(self, window, answered_by_xla):
        """Scale, head order, causality, window and gradients, with XLA answering the same call."""
        assert_as_oracle = TestReference().assert_as_oracle
        arguments = (*main_inputs("bfloat16"), *cotangents("bfloat16"))
        options = {"window": window, "scale": 0.7, "implementation": "cudnn"}
        results = attend.__wrapped__(*arguments, **options)
        assert results[1].dtype == "float32"
        assert_as_oracle(results, arguments, ONE_DOCUMENT.support(window=window), scale=0.7)

    def test_one_call_gives_output_log_sum_exp_and_gradients(self, answered_by_xla):
        """A log-sum-exp that the loss does not read costs nothing; one that it reads, a pass."""
        qkv = main_inputs("bfloat16")

        def loss(weight, *qkv):
            o, lse = dense_attention(*qkv, return_lse=True, implementation="cudnn")
            lse = lse if weight else jax.lax.stop_gradient(lse)
            return (o * lse.swapaxes(1, 2)[..., None]).sum()

        for weight, calls in ((0, 1), (1, 2)):
            answered_by_xla.clear()
            jax.grad(functools.partial(loss, weight), argnums=(0, 1, 2))(*qkv)
            assert len(answered_by_xla) == calls

    def test_a_policy_keeps_what_the_backward_rule_reads(self, answered_by_xla):
        qkv = main_inputs("bfloat16")

        def loss(*qkv):
            return dense_attention(*qkv, implementation="cudnn").astype("float32").sum()

        def calls(*names):
            policy = jax.checkpoint_policies.save_only_these_names(*names)
            gradient = jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
            # The stand-in's forward pass is an exponential, its backward pass another.
            return str(jax.make_jaxpr(gradient)(*qkv)).count(" exp ")

        assert calls() == 1 + calls("attention_out", "attention_lse")

    def test_jaxs_own_call_is_one_forward_and_one_backward(self, monkeypatch):
        """In the text that jax lowers for CUDA, which takes no GPU; the log-sum-exp is float32."""
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        module = "jax._src.cudnn.fused_attention_stablehlo"
        monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91400)
        monkeypatch.setattr(f"{module}.check_compute_capability", lambda _: True)
        monkeypatch.setattr(f"{module}.is_cuda_compute_capability_equal", lambda _: False)

        def loss(q, k, v):
            o, lse = dense_attention(q, k, v, return_lse=True, implementation="cudnn")
            return o.astype("float32").sum(), lse

        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        traced = gradient.trace(*(x[:, :60] for x in main_inputs("bfloat16")))  # it must be even
        calls = traced.lower(lowering_platforms=("cuda",)).as_text().split("custom_call @__cudnn")
        forward, backward = calls[1:]
        statistics = f"tensor<{BATCH}x{NUM_HEADS}x60xf32>"
        assert forward.startswith("$fmhaSoftmax(")
        assert backward.startswith("$fmhaSoftmaxBackward(")
        assert statistics in forward.splitlines()[0]
        assert statistics in backward.splitlines()[0]

    def test_refuses_a_jax_that_keeps_no_log_sum_exp(self, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        answer = jax.nn.dot_product_attention

        def by_xla(*qkv, implementation, **options):
            return answer(*qkv, implementation="xla", **options)

        monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
        assert "keeps no float32" in self.refusal(*main_inputs("bfloat16"))
